"""`scaler-executor run`: finds a Python program and turns this process into it, with the swap on.

The program is run by a fresh interpreter in place of this process, as by the user's own `python PROGRAM`, and not by
`runpy` in here: so `__main__`, `sys.argv`, `sys.path`, tracebacks, signals, exit codes and what multiprocessing makes
of them are the interpreter's own work. What makes the difference is `scaler_executor/site`, first in PYTHONPATH, whose
sitecustomize calls `scaler_executor.swap` and leaves no trace of itself.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

#: Holds our sitecustomize.
SITE: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")

#: The longest first line that Linux reads is 256 bytes; pip's way around that takes two lines.
_HEAD_BYTES: Final = 4096
_SCRIPT_SUFFIXES: Final = (".py", ".pyw", ".pyc", ".pyz", ".zip")


class RunError(Exception):
    """The program cannot be run; the text says why."""


def run_program(program: str, arguments: Sequence[str]) -> NoReturn:
    """Become `program`: a path to what `python PATH` runs, or the name of a console script on PATH.

    As in a shell, what has no slash is a command. It is a path too if it ends like a Python file, is "-" for standard
    input, or if there is no such command.

    Raises:
        RunError: There is no such program, or it is none of this interpreter's.
    """
    if program == "-":
        _become([program, *arguments])
    if "/" not in program and not program.endswith(_SCRIPT_SUFFIXES):
        import shutil

        command = shutil.which(program)
        if command is not None:
            interpreter, *flags = _command_interpreter(program, command)
            _become([command, *arguments], interpreter=interpreter, flags=flags)
    _check_path(program)
    # "-c.py" for example would be taken for an option.
    _become([os.path.join(".", program) if program.startswith("-") else program, *arguments])


def run_module(module: str, arguments: Sequence[str]) -> NoReturn:
    """Become `python -m module`.

    Raises:
        RunError: There is no such module; of one in a package only the package is looked up.
    """
    import importlib.util

    top = module.partition(".")[0]
    saved_path = sys.path[:]
    if not sys.flags.isolated and not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, os.getcwd())
    try:
        # Not the whole name: that would import the package, here.
        is_missing = not top or importlib.util.find_spec(top) is None
    except ValueError:
        is_missing = False  # it is imported already, and has no spec
    finally:
        sys.path[:] = saved_path
    if is_missing:
        raise RunError(f"no module named {top or module!r}")
    _become(["-m", module, *arguments])


def _become(arguments: Sequence[str], *, interpreter: str = sys.executable, flags: Sequence[str] = ()) -> NoReturn:
    """Replace this process by an interpreter with these flags and our own, and the swap on."""
    from subprocess import _args_from_interpreter_flags  # type: ignore[attr-defined]

    if not interpreter:
        raise RunError("this interpreter does not know where it is")
    flags = [*_args_from_interpreter_flags(), *flags]
    letters = {letter for flag in flags if flag.startswith("-") and flag[1:2] not in ("W", "X") for letter in flag[1:]}
    if letters & set("IES"):
        raise RunError(f"the interpreter's flags ({shlex.join(flags)}) rule the swap out: not with -I, -E or -S")
    path = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": f"{SITE}{os.pathsep}{path}" if path else SITE}
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(interpreter, [interpreter, *flags, *arguments], environment)


def _check_path(program: str) -> None:
    if os.path.exists(program) and not os.path.isfile(program):
        return  # a directory, or a pipe, which can be read only once
    try:
        head = _read_head(program)
    except FileNotFoundError:
        kind = "file" if "/" in program or program.endswith(_SCRIPT_SUFFIXES) else "command on PATH and no file"
        raise RunError(f"no such {kind}: {program}") from None
    except OSError as error:
        raise RunError(f"cannot read {program}: {error.strerror}") from None
    if _find_interpreter(head) is None:
        _check_not_foreign(program, head)


def _command_interpreter(name: str, command: str) -> list[str]:
    """Return interpreter and flags of a console script; raise RunError if it is none of this interpreter's."""
    import shutil

    try:
        head = _read_head(command)
    except OSError as error:
        raise RunError(f"cannot read {command}: {error.strerror}") from None
    found = _find_interpreter(head)
    if found is None:
        _check_not_foreign(command, head)
        raise RunError(f"{command} does not begin with `#!`, so it is no console script")
    interpreter = shutil.which(found[0])
    if interpreter is None or not _is_this_interpreter(interpreter):
        raise RunError(
            f"{command} belongs to another Python, {interpreter or found[0]}, and this is {sys.executable}:"
            f" install scaler-executor there, or {name} here"
        )
    return [interpreter, *found[1:]]


def _check_not_foreign(path: str, head: bytes) -> None:
    """Raise RunError for what is certainly no Python."""
    if head.startswith(b"\x7fELF"):
        raise RunError(f"{path} is a binary, not a Python program")
    if head.startswith(b"#!"):
        first_line = os.fsdecode(head.splitlines()[0][2:].strip())
        raise RunError(f"{path} is not a Python program: it is run by {first_line}")


def _read_head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD_BYTES)


def _find_interpreter(head: bytes) -> list[str] | None:
    """Return interpreter and flags of a script's first lines, None if that is not Python."""
    if not head.startswith(b"#!"):
        return None
    lines = os.fsdecode(head).splitlines()
    words = lines[0][2:].split(None, 1)
    if words == ["/bin/sh"] and len(lines) > 1 and lines[1].startswith("'''exec' "):
        # What pip writes where the path is too long for a first line, or has spaces: '''exec' "PYTHON" "$0" "$@"
        words = shlex.split(lines[1][len("'''exec' ") :])[:1]
    elif words and os.path.basename(words[0]) == "env":
        words = shlex.split(" ".join(words[1:]))
        while words and (words[0].startswith("-") or "=" in words[0]):
            del words[0]
    else:
        words = words[:1] + shlex.split(" ".join(words[1:]))
    if not words or not os.path.basename(words[0]).lower().startswith(("python", "pypy")):
        return None
    return words


def _is_this_interpreter(path: str) -> bool:
    """Tell whether an interpreter is this one, and of the same environment."""
    # Those of all virtual environments are links to the same file: what counts as well is where the link is.
    return os.path.realpath(path) == os.path.realpath(sys.executable) and (
        _environment(path) == _environment(sys.executable)
    )


def _environment(interpreter: str) -> str | None:
    """Return the virtual environment that an interpreter belongs to, None if to none."""
    home = os.path.dirname(os.path.dirname(os.path.abspath(interpreter)))
    return os.path.realpath(home) if os.path.exists(os.path.join(home, "pyvenv.cfg")) else None
