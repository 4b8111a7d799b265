"""Cases of `test_environment`: what of the client's process and surroundings a call finds in its worker."""

from __future__ import annotations

import gc
import importlib
import locale
import os
import resource
import signal
import sys
import threading
import time
import warnings
from typing import Any

from comparison import Pools, attempt

from scaler_executor.runtime.threads import VARIABLES

#: Apart from what every process has of its own: workers' libraries are told their share of the CPUs.
NOT_COMPARED = ("_", "TMPDIR", *VARIABLES)
STATE = "of the module"


def settle(executor: Any, fn: Any, /, *args: Any) -> Any:
    return attempt(lambda: executor.submit(fn, *args).result(30))


def surroundings() -> dict[str, Any]:
    """What a call may look at."""
    return {
        "flags": str(sys.flags),
        "xoptions": sys._xoptions,
        "warnoptions": sys.warnoptions,
        "filters": [(f[0], str(f[1]), f[2].__name__, str(f[3]), f[4]) for f in warnings.filters],
        "path": sys.path,
        "cwd": os.getcwd(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name not in NOT_COMPARED},
        "umask": umask(),
        "nice": os.nice(0),
        "files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "affinity": sorted(os.sched_getaffinity(0)),
        "hash": hash("text"),
        "executable": sys.executable,
        "prefix": sys.prefix,
        "bytecode": (sys.dont_write_bytecode, sys.pycache_prefix),
        "argv": sys.argv[1:3],
        "assertions": __debug__,
        "locale": (locale.setlocale(locale.LC_ALL), locale.getlocale(), locale.getpreferredencoding(False)),
        "file system": (sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()),
        "stdout": (sys.stdout.encoding, sys.stdout.errors, sys.stdout.line_buffering, sys.stdout.isatty()),
        "stderr": (sys.stderr.encoding, sys.stderr.errors, sys.stderr.line_buffering, sys.stderr.isatty()),
        "stdin": (sys.stdin.read(), sys.stdin.isatty(), sys.stdin.encoding),
        "open": _encoding_of_open(),
        "gc": (gc.isenabled(), gc.get_threshold()[0]),
        "recursion": sys.getrecursionlimit(),
        "interval": sys.getswitchinterval(),
        "threads": threading.active_count() <= 2,
        "main thread": threading.current_thread() is threading.main_thread(),
        "time zone": time.tzname,
        "mask": sorted(map(str, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "int digits": getattr(sys, "get_int_max_str_digits", int)(),
        "hooks": (sys.excepthook is sys.__excepthook__, sys.displayhook is sys.__displayhook__),
        "trace": (sys.gettrace(), sys.getprofile()),
        "module": STATE,
    }


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _encoding_of_open() -> str:
    with open(os.devnull) as file:
        return file.encoding.lower()


def as_the_program_started(pools: Pools) -> object:
    with pools() as executor:
        return settle(executor, surroundings)


def changed_before_the_first_call(pools: Pools) -> object:
    """State that changes between construction and the first call."""
    global STATE
    executor = pools()
    directory = os.path.join(os.path.dirname(sys.argv[5]), pools.executor_class.__name__)
    os.mkdir(directory)
    with open(os.path.join(directory, "appears_late.py"), "w") as file:
        file.write("VALUE = 5\n")
    STATE = "changed"
    os.environ["ADDED"] = "added"
    os.environ["EMPTY"] = ""
    os.environ.pop("REMOVED", None)
    os.environ["CHANGED"] = "\udcffafter"
    os.environ["TZ"] = "Asia/Tokyo"
    time.tzset()
    sys.path.append(directory)
    sys.argv[1:3] = ["changed", "arguments"]
    os.chdir(directory)
    os.umask(0o27)
    os.nice(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.setrecursionlimit(1234)
    gc.disable()
    warnings.simplefilter("ignore")
    late = importlib.import_module("appears_late")
    late.VALUE = 6
    with executor:
        seen: dict[str, Any] = settle(executor, surroundings)
        seen["path"].remove(directory)
        seen["cwd"] = seen["cwd"] == os.getcwd()
        return seen | {"late": settle(executor, look_at_late), "relative": settle(executor, look_at_relative)}


def interpreter_shaped_before_the_first_call(pools: Pools) -> object:
    """Variables that count when an interpreter starts, set and removed after construction."""
    executors = [pools(), pools(2)]
    os.environ.update(PYTHONHASHSEED="0", PYTHONWARNINGS="error::UserWarning", PYTHONOPTIMIZE="1", LC_ALL="POSIX")
    os.environ.update(PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="latin-1", ADDED="added \udcff")
    del os.environ["PYTHONUTF8"]
    seen = []
    for executor in executors:
        with executor:
            seen += [settle(executor, surroundings), settle(executor, os.getenv, "ADDED")]
    return seen


def look_at_late() -> Any:
    import appears_late  # type: ignore[import-not-found]

    return appears_late.VALUE


def look_at_relative() -> Any:
    return os.path.exists("appears_late.py")


def changed_after_the_first_call(pools: Pools) -> object:
    """What the client changes later reaches no worker that is there."""
    with pools(1) as executor:
        seen = [settle(executor, os.getenv, "LATER"), settle(executor, os.getcwd)]
        os.environ["LATER"] = "later"
        os.chdir("/")
        return [*seen, settle(executor, os.getenv, "LATER"), settle(executor, os.getcwd)]


def set_locale(pools: Pools) -> object:
    """A locale that the client has set is what fork inherits, and no fresh interpreter."""
    locale.setlocale(locale.LC_ALL, "C.UTF-8")
    with pools() as executor:
        return settle(executor, locale.setlocale, locale.LC_ALL)


# Signals


def on_signal(number: int, frame: object) -> None:
    raise TimeoutError(f"signal {number}")


def raise_signal(number: int) -> Any:
    signal.raise_signal(number)
    return "nothing came of it"


def ring_alarm() -> Any:
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    return signal.sigwait if signal.pause() else "no handler raised"


def dispositions() -> Any:
    return {
        number.name: getattr(signal.getsignal(number), "__name__", str(signal.getsignal(number)))
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP)
    }


def signal_handlers(pools: Pools) -> object:
    """Handlers of the client are its forks' as well."""
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, on_signal)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    with pools() as executor:
        seen = [settle(executor, dispositions)]
        if pools.start_method == "fork":
            seen += [settle(executor, raise_signal, number) for number in (signal.SIGTERM, signal.SIGHUP)]
            seen.append(settle(executor, ring_alarm))
            seen.append(settle(executor, dispositions))
    return seen


def mask() -> Any:
    return sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))


def mask_of_child() -> Any:
    import subprocess

    program = "import signal; print(sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout


def signal_mask(pools: Pools) -> object:
    """What the thread of the first call blocks: a program that waits for a signal by `sigwait`, say."""
    executor = pools()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM, signal.SIGCHLD})
    with executor:
        seen = [settle(executor, mask), settle(executor, raise_signal, signal.SIGUSR1)]
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        return [*seen, settle(executor, mask), settle(executor, mask_of_child)]


def unwind(fifo: str) -> None:
    try:
        with open(fifo, "w"):
            pass
        time.sleep(60)
    finally:
        print("unwound")


def stop_with_all_signals_blocked(pools: Pools) -> object:
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    with pools() as executor:
        fifo = os.path.join(os.environ["TMPDIR"], "fifo")
        os.mkfifo(fifo)
        future = executor.submit(unwind, fifo)
        with open(fifo) as started:
            started.read()
        return future.cancel(), settle(executor, mask)


def signal_handler_of_a_call(pools: Pools) -> object:
    """What a call installs, the next one finds."""
    with pools() as executor:
        return [settle(executor, install_handler), settle(executor, raise_signal, signal.SIGUSR1)]


def install_handler() -> None:
    signal.signal(signal.SIGUSR1, on_signal)


# Calls that start something themselves


def square(number: int) -> int:
    return number * number


def use_process(method: str, daemon: bool) -> Any:
    import multiprocessing

    context: Any = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=queue.put, args=("put",), daemon=daemon)
    process.start()
    value = queue.get()
    process.join()
    return value, process.exitcode, multiprocessing.active_children()


def use_pool(method: str) -> Any:
    import multiprocessing

    with multiprocessing.get_context(method).Pool(2) as pool:
        return pool.map(square, range(5))


def use_thread_pool() -> Any:
    from concurrent.futures import ThreadPoolExecutor
    from multiprocessing.pool import ThreadPool

    with ThreadPool(2) as pool, ThreadPoolExecutor(2) as executor:
        return pool.map(square, range(5)), list(executor.map(square, range(5)))


def use_executor(method: str) -> Any:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as executor:
        return executor.submit(square, 3).result(30)


def use_fork() -> Any:
    pid = os.fork()
    if not pid:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def use_subprocess() -> Any:
    import subprocess

    done = subprocess.run([sys.executable, "-c", "print(input())"], input="text", capture_output=True, text=True)
    inherited = subprocess.run(["cat"], capture_output=True, text=True)
    return done.stdout, done.returncode, inherited.stdout, os.system("exit 3") >> 8, os.popen("echo popen").read()


def use_asyncio() -> Any:
    import asyncio

    async def main() -> Any:
        process = await asyncio.create_subprocess_exec("echo", "text", stdout=asyncio.subprocess.PIPE)
        out, _ = await process.communicate()
        in_thread = await asyncio.get_running_loop().run_in_executor(None, square, 4)
        return out, in_thread, await asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(0, 2))

    return asyncio.run(main())


_left: list[Any] = []


def leave_thread(daemon: bool) -> Any:
    """A thread that outlives its call."""
    may_end = threading.Event()
    thread = threading.Thread(target=may_end.wait, daemon=daemon)
    thread.start()
    _left.append((thread, may_end))
    return thread.is_alive()


def end_threads() -> Any:
    """Threads of earlier calls are still there."""
    were_alive = [thread.is_alive() for thread, _ in _left]
    for thread, may_end in _left:
        may_end.set()
        thread.join(30)
    return were_alive, [thread.is_alive() for thread, _ in _left]


def things_that_calls_start(pools: Pools) -> object:
    own = pools.start_method or "fork"
    with pools() as executor:
        return {
            "process": [settle(executor, use_process, own, daemon) for daemon in (False, True)],
            "pool": settle(executor, use_pool, own),
            "thread pools": settle(executor, use_thread_pool),
            "executor": settle(executor, use_executor, own),
            "fork": settle(executor, use_fork),
            "subprocess": settle(executor, use_subprocess),
            "asyncio": settle(executor, use_asyncio),
            "threads": [settle(executor, leave_thread, daemon) for daemon in (False, True)],
            "later": settle(executor, end_threads),
            "still there": settle(executor, square, 5),
        }


def tasks_per_child(pools: Pools) -> object:
    """How many calls each worker made, for several limits, and what their initializers have set."""
    seen: list[Any] = []
    for limit in (1, 3):
        options: Any = {"max_tasks_per_child": limit, "initializer": set_variable, "initargs": ("SET", "here")}
        executor: Any = pools.executor_class(1, pools.context, **options)  # type: ignore[call-arg]
        with executor:
            found = [call.result(30) for call in [executor.submit(pid_and_variable) for _ in range(7)]]
        pids = [pid for pid, _ in found]
        seen.append(([pids.count(pid) for pid in dict.fromkeys(pids)], {variable for _, variable in found}))
    return seen


def set_variable(name: str, value: str) -> None:
    os.environ[name] = value


def pid_and_variable() -> Any:
    return os.getpid(), os.getenv("SET")
