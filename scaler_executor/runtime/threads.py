"""How many threads the libraries of a worker start by themselves: those of BLAS and OpenMP start one for each CPU.

With a worker for each CPU too they would be CPUs times CPUs. So each worker gets its share: the variables by which the
libraries are told, unless the user has set them, and in a fork of the user's process also what these libraries have
counted there when they were loaded. This module knows the libraries' names for that, and nothing of workers.

It runs in the forker, so that workers inherit it, and no thread may be started there. That is what OpenBLAS does after
a fork when it is told a number, however low; and it would wait for a lock that another thread of the user's process may
have had at the fork. So it is told before the fork, and told the number that it had after it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, MutableMapping
from typing import Any, Final

from scaler_executor.runtime.cgroups import cpu_count_usable
from scaler_executor.runtime.platform import loaded_libraries

#: Most libraries look at it where their own variable is not set: whoever has set it, has set it for all.
_FOR_ALL: Final = "OMP_NUM_THREADS"
#: What libraries look at when they are loaded.
VARIABLES: Final = (
    _FOR_ALL,
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMBA_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)


def cap_for_fork(workers: int) -> Callable[[], None]:
    """Have this process's OpenBLAS use no more threads than is the share of one of so many workers.

    Returns:
        What undoes it, in this process.
    """
    told: list[tuple[Callable[[int], None], int]] = []
    ctypes: Any = sys.modules.get("ctypes")
    if ctypes is not None and "numpy" in sys.modules:
        count = _read("OPENBLAS_NUM_THREADS") or _share(workers)
        for path in loaded_libraries():
            functions = _openblas_functions(ctypes, path) if "openblas" in os.path.basename(path) else None
            if functions is not None:
                get, tell = functions
                before = get()
                if before > count:
                    tell(count)
                    told.append((tell, before))

    def undo() -> None:
        for tell, before in told:
            tell(before)

    return undo


def _openblas_functions(ctypes: Any, path: str) -> tuple[Any, Any] | None:
    """Return how a library is asked for the number and told it, None if it has other names for that."""
    try:
        library = ctypes.CDLL(path, os.RTLD_NOLOAD)
    except OSError:
        return None  # the file has been replaced, say
    for prefix in ("", "scipy_"):
        for suffix in ("", "64_", "_64"):
            get = getattr(library, f"{prefix}openblas_get_num_threads{suffix}", None)
            tell = getattr(library, f"{prefix}openblas_set_num_threads{suffix}", None)
            if get is not None and tell is not None:
                return get, tell
    return None


def cap(workers: int) -> None:
    """Give the other libraries of this process, and all of its children, the share of one of so many workers."""
    _state(_share(workers), os.environ)
    ctypes: Any = sys.modules.get("ctypes")
    if ctypes is None:
        return  # an interpreter without it: `platform.prepare` has tried
    for path in loaded_libraries():
        name = os.path.basename(path)
        for marks, variable, lower in _LIBRARIES:
            if any(mark in name for mark in marks):
                count = _read(variable)
                if count:
                    try:
                        lower(ctypes, ctypes.CDLL(path, os.RTLD_NOLOAD), count)
                    except (OSError, AttributeError):
                        pass  # it calls things by other names
                break


def _share(workers: int) -> int:
    return max(1, cpu_count_usable() // workers)


def _state(share: int, environment: MutableMapping[str, str]) -> None:
    """Set the variables that the user has not set."""
    if _FOR_ALL in environment:
        return
    for name in VARIABLES:
        # Numba looks again whenever it compiles, and does not allow another number once it has threads.
        if name not in environment and not (name == "NUMBA_NUM_THREADS" and "numba" in sys.modules):
            environment[name] = str(share)


def _read(variable: str) -> int:
    """Return what is stated, 0 for nothing that can be counted with."""
    text = os.environ.get(variable) or os.environ.get(_FOR_ALL) or ""
    return int(text) if text.isdecimal() else 0


def _lower_openmp(ctypes: Any, library: Any, count: int) -> None:
    # Of this thread, which is a worker's main thread after the fork.
    if library.omp_get_max_threads() > count:
        library.omp_set_num_threads(count)


def _lower_mkl(ctypes: Any, library: Any, count: int) -> None:
    if library.MKL_Get_Max_Threads() > count:
        library.MKL_Set_Num_Threads(count)


def _lower_blis(ctypes: Any, library: Any, count: int) -> None:
    get, lower = library.bli_thread_get_num_threads, library.bli_thread_set_num_threads
    get.restype, lower.argtypes = ctypes.c_long, [ctypes.c_long]
    if get() > count:
        lower(count)


#: What a library's file name contains, where its number is stated, and how it is told.
_LIBRARIES: Final = (
    (("libmkl_rt",), "MKL_NUM_THREADS", _lower_mkl),
    (("libblis",), "BLIS_NUM_THREADS", _lower_blis),
    (("libgomp", "libomp", "libiomp"), _FOR_ALL, _lower_openmp),
)
