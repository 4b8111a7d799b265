"""The `scaler-executor` command: reads its arguments and hands over to the module that does the work.

Each subcommand adds its own parser and sets `run`, a callable from the parsed arguments to the exit code. What a
subcommand needs is imported only when it runs, so that `--help` and `--version` are quick.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from scaler_executor import __version__

_EXAMPLE = """\
example:
  scaler-executor demo              try it on the standard library's source files, with one worker per CPU
  scaler-executor demo --workers 2
  scaler-executor run black src     a program of yours or from PyPI, its ProcessPoolExecutor swapped
"""
_RUN_DESCRIPTION = """\
Run an unmodified Python program in which concurrent.futures.ProcessPoolExecutor is ScalerExecutor. All else is as
without us: its arguments, standard input, exit code and Ctrl-C. What stands behind PROGRAM, COMMAND or MODULE belongs
to the program.
"""
_RUN_EXAMPLE = """\
example:
  scaler-executor run report.py --year 2024       a file, or a directory or archive with a __main__.py
  scaler-executor run black --workers 4 src       a console script of this Python's environment, found on PATH
  scaler-executor run -m compileall -q -j 4 src   a module
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments without the program's name; None means `sys.argv[1:]`.

    Returns:
        The exit code: 0 when all went well, 1 when the subcommand failed. Wrong usage exits with 2, as argparse does.
    """
    own, behind = _split(list(sys.argv[1:] if argv is None else argv))
    arguments = _parser().parse_args(own)
    arguments.behind = behind
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scaler-executor",
        description="Run Python calls on worker processes behind a concurrent.futures.Executor.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"scaler-executor {__version__}")
    subcommands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(subcommands)
    _add_run(subcommands)
    return parser


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return our own arguments and those of the program that is to be run, which argparse must not see."""
    if arguments[:1] != ["run"]:
        return arguments, []
    end = 1
    while end < len(arguments) and arguments[end].startswith("-") and arguments[end] not in ("-", "--", "-m"):
        end += 1
    # `-m` and `--` are followed by the program.
    end += 2 if arguments[end : end + 1] in (["-m"], ["--"]) else 1
    return arguments[:end], arguments[end:]


def _add_demo(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "analyse the standard library's source files, cancel running calls, survive a crash"
    demo = subcommands.add_parser("demo", help=summary, description=summary.capitalize() + ".")
    demo.add_argument("--workers", type=_positive, metavar="N", help="worker processes (default: the usable CPUs)")
    demo.set_defaults(run=_run_demo)


def _run_demo(arguments: argparse.Namespace) -> int:
    from scaler_executor import demo

    return demo.run(workers=arguments.workers)


def _add_run(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    run = subcommands.add_parser(
        "run",
        help="run a program with its ProcessPoolExecutor swapped",
        usage="%(prog)s [-h] (PROGRAM | COMMAND | -m MODULE) ...",
        description=_RUN_DESCRIPTION,
        epilog=_RUN_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = run.add_mutually_exclusive_group(required=True)
    what.add_argument("program", nargs="?", metavar="PROGRAM", help="a path, or a command on PATH")
    what.add_argument("-m", dest="module", metavar="MODULE", help="a module or package, as for `python -m`")
    run.set_defaults(run=_run_run)


def _run_run(arguments: argparse.Namespace) -> int:
    from scaler_executor.run import RunError, run_module, run_program

    try:
        if arguments.module is not None:
            run_module(arguments.module, arguments.behind)
        run_program(arguments.program, arguments.behind)
    except RunError as error:
        print(f"scaler-executor run: {error}", file=sys.stderr)
        return 2


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number
