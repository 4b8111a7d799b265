"""How many threads the libraries of a worker start by themselves: those of BLAS and OpenMP start one for each CPU.

With a worker for each CPU too they would be CPUs times CPUs. So each worker gets its share: the variables by which the
libraries are told, unless the user has set them, and in a fork of the user's process also what these libraries have
counted there when they were loaded. This module knows the libraries' names for that, and nothing of workers.

It runs in the forker, so that workers inherit it: no thread may be started here. OpenBLAS's own function would start
as many as there are CPUs, to have most of them sleep. Its threads do not survive a fork, so it will start new ones when
they are first wanted, and the variables in which it keeps their number are written instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
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


def cap(workers: int) -> None:
    """Give the libraries of this process, and of its children, the share of one of so many workers."""
    share = max(1, cpu_count_usable() // workers)
    _state(share, os.environ)
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
                        lower(ctypes, ctypes.CDLL(path), count)
                    except (OSError, AttributeError, ValueError):
                        pass  # it calls things by other names
                break


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


def _lower_openblas(ctypes: Any, library: Any, count: int) -> None:
    if ctypes.c_int.in_dll(library, "blas_server_avail").value:
        return  # it has threads here
    for name in ("blas_cpu_number", "blas_num_threads"):
        variable = ctypes.c_int.in_dll(library, name)
        variable.value = min(variable.value, count)


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
    (("openblas",), "OPENBLAS_NUM_THREADS", _lower_openblas),
    (("libmkl_rt",), "MKL_NUM_THREADS", _lower_mkl),
    (("libblis",), "BLIS_NUM_THREADS", _lower_blis),
    (("libgomp", "libomp", "libiomp"), _FOR_ALL, _lower_openmp),
)
