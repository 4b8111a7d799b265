"""Records in the file $POOL_RECORD each process pool that a program makes and whether it is used, swapped or not.

Stands in PYTHONPATH of both runs of a tool; `scaler-executor run` gives way to it when its own work is done.
"""

import functools
import os
from concurrent.futures import Executor, ProcessPoolExecutor


def _record(line):
    with open(os.environ["POOL_RECORD"], "a") as file:
        file.write(f"{line}\n")


#: The class that does the work: what is swapped in is derived from it, and goes its own way where `submit` is not its.
_CLASS = ProcessPoolExecutor if ProcessPoolExecutor.__base__ is Executor else ProcessPoolExecutor.__base__


def _recording(method):
    @functools.wraps(method)
    def recorded(self, *args, **kwargs):
        _record(f"{_CLASS.__module__}.{_CLASS.__qualname__} {method.__name__}")
        return method(self, *args, **kwargs)

    return recorded


for _name in ("__init__", "submit", "map"):
    setattr(_CLASS, _name, _recording(getattr(_CLASS, _name)))
