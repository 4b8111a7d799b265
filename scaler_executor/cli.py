"""The `scaler-executor` command: reads its arguments and hands over to the module that does the work.

Each subcommand adds its own parser and sets `run`, a callable from the parsed arguments to the exit code. What a
subcommand needs is imported only when it runs, so that `--help` and `--version` are quick.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from scaler_executor import __version__
from scaler_executor.defaults import ADDRESS_VARIABLE, CREDENTIALS_VARIABLE

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
_ADDRESS_HELP = "a connection file, or tcp://HOST:PORT with --credentials"
_ADDRESS_DEFAULT = "(default: SCALER_EXECUTOR_ADDRESS, or the cluster that is served here)"
_CREDENTIALS_HELP = "the connection file with the keys for tcp://HOST:PORT (default: SCALER_EXECUTOR_CREDENTIALS)"
_SERVE_DESCRIPTION = """\
Host a cluster: a scheduler, and workers on this machine. Whoever has its connection file, and only they, can run calls
on it, as the user who serves; carry the file to another machine to use the cluster from there, or to join it with that
machine's workers.

SIGINT or SIGTERM: new calls are refused, queued ones handed back, running ones get --grace seconds; a second one stops
them. Exit codes: 0 when nothing was cut short, 1 when something was, 2 when it could not start.
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
    _add_serve(subcommands)
    _add_keygen(subcommands)
    _add_status(subcommands)
    _add_cancel(subcommands)
    return parser


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return our own arguments and those of the program that is to be run, which argparse must not see."""
    if arguments[:1] != ["run"]:
        return arguments, []
    end = 1
    while end < len(arguments) and arguments[end].startswith("-") and arguments[end] not in ("-", "--", "-m"):
        end += 2 if arguments[end] in ("--address", "--credentials") else 1
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
        usage="%(prog)s [-h] [--address ADDRESS [--credentials FILE]] (PROGRAM | COMMAND | -m MODULE) ...",
        description=_RUN_DESCRIPTION,
        epilog=_RUN_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = run.add_mutually_exclusive_group(required=True)
    what.add_argument("program", nargs="?", metavar="PROGRAM", help="a path, or a command on PATH")
    what.add_argument("-m", dest="module", metavar="MODULE", help="a module or package, as for `python -m`")
    run.add_argument("--address", metavar="ADDRESS", help=f"have its calls run on a cluster: {_ADDRESS_HELP}")
    run.add_argument("--credentials", metavar="FILE", help=_CREDENTIALS_HELP)
    run.set_defaults(run=_run_run)


def _run_run(arguments: argparse.Namespace) -> int:
    from scaler_executor.run import RunError, run_module, run_program

    if arguments.address is not None or arguments.credentials is not None:
        from scaler_executor.runtime.security import ConfigurationError

        try:
            _set_address(arguments.address, arguments.credentials)
        except ConfigurationError as error:
            print(f"scaler-executor run: {error}", file=sys.stderr)
            return 2
    try:
        if arguments.module is not None:
            run_module(arguments.module, arguments.behind)
        run_program(arguments.program, arguments.behind)
    except RunError as error:
        print(f"scaler-executor run: {error}", file=sys.stderr)
        return 2


def _set_address(address: str | None, credentials: str | None) -> None:
    """Have this process, and those that it starts, use a cluster; see `security.resolve`."""
    from scaler_executor.runtime.security import ConfigurationError, resolve

    address = address or os.environ.get(ADDRESS_VARIABLE)
    if not address:
        raise ConfigurationError("--credentials goes with --address")
    resolve(address, credentials)
    is_file = "://" not in address
    # The program may change its working directory.
    os.environ[ADDRESS_VARIABLE] = os.path.abspath(os.path.expanduser(address)) if is_file else address
    if credentials is not None:
        os.environ[CREDENTIALS_VARIABLE] = os.path.abspath(os.path.expanduser(credentials))


def _positive(text: str) -> int:
    number = _whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _add_serve(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = subcommands.add_parser(
        "serve",
        help="host a cluster, or join one with this machine's workers",
        description=_SERVE_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("--bind", metavar="tcp://HOST:PORT", help="where to listen (default: loopback)")
    serve.add_argument("--join", metavar="ADDRESS", help=f"join a cluster instead: {_ADDRESS_HELP}")
    serve.add_argument("--credentials", metavar="FILE", help=f"with --join: {_CREDENTIALS_HELP}")
    serve.add_argument("--workers", type=_not_negative, metavar="N", help="workers here (default: the usable CPUs)")
    serve.add_argument("--connection-file", type=Path, metavar="PATH", help="where to write it")
    serve.add_argument("--name", metavar="NAME", help="of the cluster, or of the machine that joins")
    serve.add_argument("--preload", nargs="+", default=[], metavar="MODULE", help="what workers find imported")
    serve.add_argument(
        "--grace", type=_seconds, default=30.0, metavar="S", help="what runs at the end may take so long"
    )
    serve.add_argument(
        "--log-level",
        default="warning",
        choices=["debug", "info", "warning", "error"],
        metavar="L",
        help="debug, info, warning or error",
    )
    serve.set_defaults(run=_run_serve)


def _run_serve(arguments: argparse.Namespace) -> int:
    from scaler_executor.runtime.signals import hold_back_signals

    hold_back_signals()  # before all the rest is imported
    from scaler_executor import serving
    from scaler_executor.runtime.security import ConfigurationError

    try:
        if arguments.join is not None:
            refused = [name for name in ("bind", "connection_file") if getattr(arguments, name) is not None]
            if refused:
                option = "--" + refused[0].replace("_", "-")
                raise ConfigurationError(f"{option} does not go with --join: it is for whoever hosts the cluster")
            return serving.join(
                arguments.join,
                credentials=arguments.credentials,
                workers=arguments.workers,
                name=arguments.name,
                preload=arguments.preload,
                grace_s=arguments.grace,
                log_level=arguments.log_level,
            )
        if arguments.credentials is not None:
            raise ConfigurationError("--credentials goes with --join; who serves makes keys of its own")
        return serving.serve(
            bind=arguments.bind,
            workers=arguments.workers,
            connection_file=arguments.connection_file,
            name=arguments.name,
            preload=arguments.preload,
            grace_s=arguments.grace,
            log_level=arguments.log_level,
        )
    except ConfigurationError as error:
        print(f"scaler-executor serve: {error}", file=sys.stderr)
        return 2


def _add_keygen(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    keygen = subcommands.add_parser(
        "keygen",
        help="let somebody else use a served cluster, or no more",
        description="Make another connection file for a cluster that is served here, with a key of its own; revoke one;"
        " or list those that there are.",
    )
    keygen.add_argument("who", nargs="?", metavar="NAME", help="whose key it is")
    keygen.add_argument("--cluster", default="default", metavar="NAME", help="as given to serve --name")
    keygen.add_argument("--output", type=Path, metavar="FILE", help="where to write it (default: NAME.connection.json)")
    keygen.add_argument("--address", metavar="tcp://HOST:PORT", help="as which they reach it, if not as serve listens")
    keygen.add_argument("--revoke", action="store_true", help="end what this key gives access to, at once")
    keygen.set_defaults(run=_run_keygen)


def _run_keygen(arguments: argparse.Namespace) -> int:
    from scaler_executor import serving
    from scaler_executor.runtime.security import ConfigurationError

    try:
        if arguments.who is None:
            given = [name for name in ("output", "address", "revoke") if getattr(arguments, name)]
            if given:
                raise ConfigurationError(f"--{given[0]} goes with the NAME of a key")
            serving.list_keys(arguments.cluster)
        elif arguments.revoke:
            serving.revoke(arguments.cluster, arguments.who)
        else:
            serving.keygen(arguments.cluster, arguments.who, output=arguments.output, address=arguments.address)
    except ConfigurationError as error:
        print(f"scaler-executor keygen: {error}", file=sys.stderr)
        return 2
    return 0


def _add_status(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "show what a served cluster is doing: machines, clients, running calls"
    status = subcommands.add_parser("status", help=summary, description=summary.capitalize() + ".")
    status.add_argument("address", nargs="?", metavar="ADDRESS", help=f"{_ADDRESS_HELP} {_ADDRESS_DEFAULT}")
    status.add_argument("--credentials", metavar="FILE", help=_CREDENTIALS_HELP)
    status.add_argument("--json", action="store_true", help="for programs")
    status.set_defaults(run=_run_status)


def _run_status(arguments: argparse.Namespace) -> int:
    from scaler_executor import operating

    return operating.run(
        lambda: operating.status(arguments.address, arguments.credentials, as_json=arguments.json), "status"
    )


def _add_cancel(subcommands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    summary = "stop calls of a served cluster, whosever they are"
    cancel = subcommands.add_parser(
        "cancel",
        help=summary,
        description=summary.capitalize() + ". Exit code 1: not all of them were found, or have stopped.",
        usage="%(prog)s [-h] [--credentials FILE] [ADDRESS] TASK [TASK ...]",
    )
    cancel.add_argument("address", nargs="?", metavar="ADDRESS", help=f"{_ADDRESS_HELP} {_ADDRESS_DEFAULT}")
    cancel.add_argument("tasks", nargs="+", metavar="TASK", help="as `status` names them, 3.17 say")
    cancel.add_argument("--credentials", metavar="FILE", help=_CREDENTIALS_HELP)
    cancel.set_defaults(run=_run_cancel, parser=cancel)


def _run_cancel(arguments: argparse.Namespace) -> int:
    from scaler_executor import operating

    words = arguments.tasks if arguments.address is None else [arguments.address, *arguments.tasks]
    address = None if _task(words[0]) is not None else words.pop(0)
    if not words:
        arguments.parser.error(f"{address!r} is not a task; they are named 3.17, say")
    tasks: list[tuple[int, int]] = []
    for word in dict.fromkeys(words):
        if (task := _task(word)) is None:
            arguments.parser.error(f"{word!r} is not a task; they are named 3.17, say")
        else:
            tasks.append(task)
    return operating.run(lambda: operating.cancel(address, arguments.credentials, tasks), "cancel")


def _task(text: str) -> tuple[int, int] | None:
    """Return (client_id, no), None if `text` does not name a task."""
    client_id, _, no = text.partition(".")
    if not (client_id.isdecimal() and no.isdecimal()):
        return None
    return int(client_id), int(no)


def _not_negative(text: str) -> int:
    number = _whole(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} is negative")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return number


if __name__ == "__main__":
    sys.exit(main())
