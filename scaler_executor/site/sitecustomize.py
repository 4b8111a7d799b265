"""Run by the interpreter's `site` at the start of a program under `scaler-executor run`, before the program.

This folder stands first in PYTHONPATH then, and holds nothing else. It takes itself out of `sys.path` and the
environment, so that neither the program nor the processes that it starts see any of it, swaps the class and gives way
to the sitecustomize that would have been found without it.
"""

import os
import sys


def _take_over() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if entry != here]
    sys.path_importer_cache.pop(here, None)
    behind = os.environ["PYTHONPATH"][len(here) + 1 :]
    if behind:
        os.environ["PYTHONPATH"] = behind
    else:
        del os.environ["PYTHONPATH"]
    # The program need not be able to import the package: it is taken from where this file is, and nothing else is.
    sys.path.insert(0, os.path.dirname(os.path.dirname(here)))
    import scaler_executor

    del sys.path[0], scaler_executor
    from scaler_executor.swap import install

    install()


try:
    _take_over()
except BaseException as error:
    # `site` would print a line and go on, with a program that is not what was asked for.
    print(f"scaler-executor run: the swap failed: {error!r}", file=sys.stderr, flush=True)
    os._exit(2)
del sys.modules["sitecustomize"]
import sitecustomize  # type: ignore[import-not-found,unused-ignore] # noqa: E402,F401  # where there is none, `site` expects this error
