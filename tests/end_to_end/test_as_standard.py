"""Programs that live and die as with ProcessPoolExecutor: each is run with both, and ends in the same way.

What is compared is the exit code, standard output and standard error. Where the standard library's own behaviour
depends on the version of Python, or is a known fault, the test says so.
"""

from __future__ import annotations

import re
import sys

import pytest
from programs import Ended, assert_none_left, run
from support import Scene

#: {case: program}. What it prints is what is promised.
CASES = {
    "nothing done": """
make()
print("end")
""",
    "pending work at exit": """
executor = make(1)
for number in range(20):
    executor.submit(time.sleep, 0.005).add_done_callback(lambda future: sys.stdout.write("called\\n"))
executor.map(time.sleep, [0.005] * 20)
sys.stdout.write("end\\n")
""",
    "exception at the end": """
executor = make()
future = executor.submit(print, "called", flush=True)
time.sleep(0)
wait([future])
executor.submit(time.sleep, 0.05).add_done_callback(lambda future: print("called back"))
raise ValueError("user's own")
""",
    "sys.exit": """
executor = make()
executor.submit(time.sleep, 0.05).add_done_callback(lambda future: print("called back"))
sys.exit(7)
""",
    "sys.exit with a message": """
with make() as executor:
    executor.submit(time.sleep, 0.05).add_done_callback(lambda future: print("called back"))
    sys.exit("a message")
""",
    "from a thread": """
ready = threading.Event()
def work():
    executor = make()
    print(executor.submit(abs, -1).result())
    executor.submit(time.sleep, 0.1).add_done_callback(lambda future: print("called back"))
    ready.set()
threading.Thread(target=work).start()
ready.wait()
""",
    "from a daemon thread": """
ready = threading.Event()
def work():
    executor = make()
    print(executor.submit(abs, -1).result(), flush=True)
    executor.submit(time.sleep, 0.2).add_done_callback(lambda future: print("called back", flush=True))
    ready.set()
    threading.Event().wait()
threading.Thread(target=work, daemon=True).start()
ready.wait()
print("end", flush=True)
""",
    "a thread that submits until it may not": """
executor = make()
executor.submit(abs, 1).result()
main = threading.main_thread()
def work():
    try:
        while True:
            executor.submit(abs, 1).result()
    except RuntimeError as error:
        print(error)
threading.Thread(target=work).start()
""",
    "a daemon thread that waits for a result": """
executor = make()
future = executor.submit(time.sleep, 0.2)
def work():
    future.result()
    print("result", flush=True)
thread = threading.Thread(target=work, daemon=True)
thread.start()
executor.shutdown()
thread.join()
""",
    "atexit submits": """
executor = make()
print(executor.submit(abs, -1).result())
def at_exit():
    try:
        executor.submit(abs, -2)
    except RuntimeError as error:
        print(error)
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)
    print("atexit ends")
atexit.register(at_exit)
""",
    "atexit of multiprocessing submits": """
from multiprocessing import util
executor = make()
print(executor.submit(abs, -1).result())
def at_exit():
    try:
        executor.submit(abs, -2)
    except RuntimeError as error:
        print(error)
util.Finalize(None, at_exit, exitpriority=100)
""",
    "atexit reads results": """
executor = make()
future = executor.submit(abs, -1)
pending = executor.submit(time.sleep, 0.05)
items = executor.map(abs, range(-3, 3))
atexit.register(lambda: print(future.result(), pending.result(), list(items), future.cancelled()))
""",
    "a callback submits": """
executor = make()
done = threading.Event()
def call_back(future):
    executor.submit(abs, -5).add_done_callback(lambda future: (print(future.result()), done.set()))
executor.submit(abs, 1).add_done_callback(call_back)
done.wait()
""",
    "a callback submits after shutdown": """
executor = make()
def call_back(future):
    try:
        executor.submit(abs, 1)
    except RuntimeError as error:
        print(error)
executor.submit(time.sleep, 0.1).add_done_callback(call_back)
executor.shutdown()
print("end")
""",
    "a callback submits at exit": """
executor = make()
def call_back(future):
    try:
        executor.submit(abs, 1)
    except RuntimeError as error:
        print(error)
executor.submit(time.sleep, 0.3).add_done_callback(call_back)
""",
    "a callback shuts down": """
executor = make()
done = threading.Event()
def call_back(future):
    executor.shutdown(wait=False)
    print("shut down")
    done.set()
executor.submit(abs, 1).add_done_callback(call_back)
done.wait()
try:
    executor.submit(abs, 1)
except RuntimeError as error:
    print(error)
""",
    "a callback raises": """
import logging
logging.basicConfig(format="%(name)s", stream=sys.stdout)
executor = make()
def call_back(future):
    raise LookupError
future = executor.submit(time.sleep, 0.1)
future.add_done_callback(call_back)
executor.shutdown()
""",
    "shutdown without waiting, then exit": """
executor = make(1)
for number in range(5):
    executor.submit(time.sleep, 0.02).add_done_callback(lambda future: print("called"))
executor.shutdown(wait=False)
try:
    executor.submit(abs, 1)
except RuntimeError as error:
    print(error)
""",
    "shutdown without waiting, then an exception": """
executor = make(1)
executor.submit(time.sleep, 0.1).add_done_callback(lambda future: print("called"))
executor.shutdown(wait=False)
raise LookupError
""",
    "shutdown in every state": """
for wait_first in (True, False):
    for cancel in (True, False):
        for calls in (0, 1, 5):
            executor = make(1)
            futures = [executor.submit(time.sleep, 0.01) for _ in range(calls)]
            executor.shutdown(wait=wait_first, cancel_futures=cancel)
            executor.shutdown(wait=not wait_first, cancel_futures=not cancel)
            executor.shutdown()
            if wait_first:  # else the standard library waits no more
                print(calls, all(future.done() for future in futures))
            for attempt in (lambda: executor.submit(abs, 1), lambda: executor.map(abs, [1])):
                try:
                    attempt()
                except RuntimeError as error:
                    print(error)
""",
    "shutdown of a broken one": """
executor = make(1)
try:
    executor.submit(os._exit, 1).result()
except Exception as error:
    print(isinstance(error, RuntimeError))
executor.shutdown()
executor.shutdown()
try:
    executor.submit(abs, 1)
except RuntimeError as error:
    print("refused")
""",
    "many threads shut down": """
executor = make()
futures = [executor.submit(time.sleep, 0.01) for _ in range(10)]
for future in futures:
    future.add_done_callback(lambda future: print("called"))
threads = [threading.Thread(target=executor.shutdown, args=(number % 2 == 0,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
executor.shutdown()
""",
    "garbage": """
for number in range(3):
    executor = make(1)
    executor.submit(time.sleep, 0.05).add_done_callback(lambda future: print("called\\n", end=""))
    del executor
    gc.collect()
print(make(1).submit(abs, -3).result(), list(make(1).map(abs, [-1, -2])))
""",
    "garbage in a cycle": """
class Owner:
    def __init__(self):
        self.executor = make(1)
        self.future = self.executor.submit(time.sleep, 0.05)
        self.future.add_done_callback(self.called)
    def called(self, future):
        print("called")
Owner()
gc.collect()
""",
    "a global that is never shut down, used in a destructor": """
class Owner:
    def __init__(self):
        self.executor = make(1)
        self.executor.submit(abs, 1).result()
    def __del__(self):
        self.executor.shutdown()
        os.write(1, b"shut down\\n")
owner = Owner()
""",
    "a call that starts a thread that is no daemon": """
with make(1) as executor:
    executor.submit(workload.start_thread, 0.2).result()
print("end", flush=True)
""",
    "a call that starts a process": """
with make(1) as executor:
    print(executor.submit(workload.start_process, 0.2).result())
print("end", flush=True)
""",
    "exit of a fork": """
executor = make()
future = executor.submit(time.sleep, 0.3)
pid = os.fork()
if not pid:
    sys.exit(5)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(future.result(), executor.submit(abs, -1).result())
""",
    "executor of a fork": """
import multiprocessing as mp
def in_child():
    with make(1) as executor:
        print(executor.submit(abs, -4).result(), flush=True)
executor = make()
print(executor.submit(abs, -1).result(), flush=True)
process = mp.get_context("fork").Process(target=in_child)
process.start()
process.join()
print(process.exitcode, executor.submit(abs, -2).result())
""",
    "in a child of multiprocessing": """
def in_child():
    executor = make(1)
    executor.submit(time.sleep, 0.05).add_done_callback(lambda future: print("called", flush=True))
process = multiprocessing.get_context("fork").Process(target=in_child)
process.start()
process.join()
print(process.exitcode)
""",
    "SIGTERM to itself, handled": """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))
with make() as executor:
    executor.submit(time.sleep, 0.1).add_done_callback(lambda future: print("called"))
    os.kill(os.getpid(), signal.SIGTERM)
""",
    "chained exceptions": """
def shape(error):
    notes = getattr(error, "__notes__", None)
    return type(error).__name__, str(error).splitlines()[:1], notes, error.__suppress_context__
with make(1) as executor:
    for call in (workload.raise_chain, workload.raise_from, workload.raise_from_none, workload.raise_with_note):
        error = executor.submit(call).exception()
        while error is not None:
            text = str(error)
            print(shape(error) if "Traceback" not in text else text.count("Traceback"))
            error = error.__cause__ or error.__context__
""",
    "groups of exceptions": """
with make(1) as executor:
    error = executor.submit(workload.raise_group).exception()
    if error is not None:
        print(repr(error), [getattr(one, "__notes__", None) for one in getattr(error, "exceptions", [])])
        print([type(one.__cause__).__name__ for one in getattr(error, "exceptions", [])])
""",
    "attributes of exceptions": """
with make(1) as executor:
    for error in (OSError(2, "no", "file"), StopIteration(3), UnicodeDecodeError("ascii", b"x", 0, 1, "why")):
        raised = executor.submit(workload.fail, error).exception()
        print(repr(raised), vars(raised).keys(), str(raised))
""",
}
#: Cases in which the standard library itself complains on standard error, depending on its version: of its fork's exit
#: hook, of descriptors that another thread has closed, of semaphores that are gone. We are to say nothing.
NOISY = {"exit of a fork", "many threads shut down"}
#: Cases in which ProcessPoolExecutor hangs now and then, up to Python 3.10 at least, and what they are to print.
HANGING = {"in a child of multiprocessing": Ended(0, "called\n0", "")}
#: Cases whose lines come from several threads.
UNORDERED = {"garbage", "pending work at exit"}
REFUSAL = re.compile("after interpreter shutdown")


def normal(case: str, ended: Ended) -> Ended:
    """Leave out what differs from run to run, and the lines of tracebacks that are not the program's."""
    stdout, stderr = [
        [line for line in text.splitlines() if not line.startswith("  ")] for text in (ended.stdout, ended.stderr)
    ]
    if case in UNORDERED:
        stdout.sort()
    # Which of the two texts the standard library has at the interpreter's exit is a race of its threads there.
    return Ended(ended.code, *[REFUSAL.sub("after shutdown", "\n".join(lines)) for lines in (stdout, stderr)])


@pytest.mark.parametrize("case", CASES)
def test_as_standard(scene: Scene, start_method: str, case: str) -> None:
    """The program ends with the exit code, the output and the errors that it has with ProcessPoolExecutor."""
    if case == "groups of exceptions" and sys.version_info < (3, 11):
        pytest.skip("there are no groups")
    ours = normal(case, run(scene, "scaler", start_method, CASES[case]))
    assert_none_left(scene)
    if case in HANGING:
        assert ours == HANGING[case]
        return
    standard = normal(case, run(scene, "standard", start_method, CASES[case]))
    if case in NOISY:
        assert ours.stderr == ""
        standard = standard._replace(stderr="")
    assert ours == standard


AT_EXIT = "cannot schedule new futures after interpreter shutdown"
SUBMIT_AT_EXIT = """
if is_used:
    executor = make()
    executor.submit(abs, 1).result()
def attempt(name):
    calls = [lambda: make().submit(abs, 1), lambda: make().map(abs, [1])]
    if is_used:
        calls += [lambda: executor.submit(abs, 1), lambda: executor.map(abs, [1])]
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            print(name, error)
atexit.register(attempt, "atexit")
def work():
    threading.main_thread().join()
    attempt("thread")
threading.Thread(target=work).start()
"""


@pytest.mark.parametrize("is_used", [False, True], ids=["first", "used"])
def test_submit_at_exit(scene: Scene, start_method: str, is_used: bool) -> None:
    """At the interpreter's exit calls are refused in the words of the standard library, also by executors that are
    made then."""
    ended = run(scene, "scaler", start_method, f"is_used = {is_used}{SUBMIT_AT_EXIT}")
    assert_none_left(scene)
    assert (ended.code, ended.stderr) == (0, "")
    count = 4 if is_used else 2
    assert ended.stdout.splitlines() == count * [f"thread {AT_EXIT}"] + count * [f"atexit {AT_EXIT}"]


def test_os_exit(scene: Scene, start_method: str) -> None:
    """os._exit ends the program at once and leaves nothing; the standard library's workers stay behind."""
    source = """
executor = make()
executor.submit(abs, 1).result()
executor.submit(time.sleep, 3600)
print("end", flush=True)
os._exit(3)
"""
    assert run(scene, "scaler", start_method, source) == Ended(3, "end\n", "")
    assert_none_left(scene)


def test_shutdown_after_one_that_did_not_wait(scene: Scene, start_method: str) -> None:
    """shutdown() after shutdown(wait=False) waits; the standard library's forgets what it would wait for."""
    source = """
executor = make()
future = executor.submit(time.sleep, 0.2)
executor.shutdown(wait=False)
executor.shutdown()
print(future.done())
"""
    assert run(scene, "scaler", start_method, source) == Ended(0, "True\n", "")
