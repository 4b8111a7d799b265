"""The `scaler-executor` command: reads its arguments and hands over to the module that does the work.

Each subcommand adds its own parser and sets `run`, a callable from the parsed arguments to the exit code. What a
subcommand needs is imported only when it runs, so that `--help` and `--version` are quick.
"""

import argparse
from collections.abc import Callable, Sequence

from scaler_executor import __version__

_EXAMPLE = """\
example:
  scaler-executor demo              try it on the standard library's source files, with one worker per CPU
  scaler-executor demo --workers 2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: The arguments without the program's name; None means `sys.argv[1:]`.

    Returns:
        The exit code: 0 when all went well, 1 when the subcommand failed. Wrong usage exits with 2, as argparse does.
    """
    arguments = _parser().parse_args(argv)
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
    return parser


def _add_demo(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "analyse the standard library's source files, cancel running calls, survive a crash"
    demo = subcommands.add_parser("demo", help=summary, description=summary.capitalize() + ".")
    demo.add_argument("--workers", type=_positive, metavar="N", help="worker processes (default: the usable CPUs)")
    demo.set_defaults(run=_run_demo)


def _run_demo(arguments: argparse.Namespace) -> int:
    from scaler_executor import demo

    return demo.run(workers=arguments.workers)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number
