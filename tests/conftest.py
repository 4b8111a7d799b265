"""What holds for all tests."""

import signal

# A shell without job control has what it runs in the background ignore Ctrl-C, and nohup has it ignore a hang-up. The
# programs that tests run and interrupt would inherit that. A handler they do not, and the tests themselves go on as
# they were meant to.
for _number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, lambda *_: None)
