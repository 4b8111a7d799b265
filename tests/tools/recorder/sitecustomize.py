"""Records in the file $POOL_RECORD each process pool that a program makes and whether it is used, swapped or not.

Stands in PYTHONPATH of both runs of a tool; `scaler-executor run` gives way to it when its own work is done.
"""

import functools
import os
from concurrent.futures import ProcessPoolExecutor


def _record(line):
    with open(os.environ["POOL_RECORD"], "a") as file:
        file.write(f"{line}\n")


def _recording(method):
    @functools.wraps(method)
    def recorded(self, *args, **kwargs):
        base = ProcessPoolExecutor.__mro__[1]
        _record(f"{base.__module__}.{base.__qualname__} {method.__name__}")
        return method(self, *args, **kwargs)

    return recorded


for _name in ("__init__", "submit", "map"):
    setattr(ProcessPoolExecutor, _name, _recording(getattr(ProcessPoolExecutor, _name)))
