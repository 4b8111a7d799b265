"""Cases of `test_arguments`: how constructor, submit, map and shutdown take their arguments."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from comparison import Pools, attempt, describe_error


def take_anything(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return args, kwargs


def take_positional_only(first: int, /, second: int = 2, *, third: int = 3, **rest: int) -> Any:
    return first, second, third, rest


def take_names(fn: int, self: int, timeout: int, chunksize: int, function: int, args: int, kwargs: int) -> Any:
    return fn, self, timeout, chunksize, function, args, kwargs


def fail() -> None:
    raise LookupError("not found")


class Callables:
    """Ways to be called."""

    def __init__(self, value: int = 1) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Callables) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"('callables', {self.value})"

    def __call__(self, more: int) -> int:
        return self.value + more

    def method(self, more: int) -> int:
        return self.value * more

    @classmethod
    def of_class(cls, value: int) -> str:
        return f"{cls.__name__} {value}"

    @staticmethod
    def static(value: int) -> int:
        return -value


def settle(executor: Executor, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Submit a call and return what became of it."""
    return attempt(lambda: executor.submit(fn, *args, **kwargs).result())


def arguments_of_calls(pools: Pools) -> object:
    with pools() as executor:
        names = {"fn": 1, "self": 2, "timeout": 3, "chunksize": 4, "function": 5, "args": 6, "kwargs": 7}
        many = {f"name{number}": number for number in range(300)}
        return [
            settle(executor, take_anything, *range(300), **many),
            settle(executor, take_anything, None, ..., NotImplemented, True, 1.5, 2j, b"x", "\udc80", {1}, [()]),
            settle(executor, take_anything, **names),
            settle(executor, take_names, **names),
            settle(executor, take_anything, **{"not an identifier": 1, "": 2, "class": 3}),
            settle(executor, take_positional_only, 1),
            settle(executor, take_positional_only, 1, 5, third=6, first=7, fourth=8),
            settle(executor, take_positional_only, first=1),
            settle(executor, take_positional_only),
            settle(executor, take_positional_only, 1, 2, 3),
        ]


def callables(pools: Pools) -> object:
    with pools() as executor:
        return [
            settle(executor, dict, a=1, self=2),
            settle(executor, max, 1, 5, key=operator.neg),
            settle(executor, getattr, "text", "__len__", None) is not None,
            settle(executor, int.from_bytes, b"\x01\x02", "big", signed=True),
            settle(executor, "-".join, ["a", "b"]),
            settle(executor, str.upper, "text"),
            settle(executor, [1, 2].__len__),
            settle(executor, functools.partial(take_anything, 1, fn=2), 3, self=4),
            settle(executor, operator.itemgetter(1), "xyz"),
            settle(executor, operator.methodcaller("split", sep=","), "a,b"),
            settle(executor, Callables, 5),
            settle(executor, Callables(5), 6),
            settle(executor, Callables(5).method, 6),
            settle(executor, Callables.of_class, 5),
            settle(executor, Callables.static, 5),
            settle(executor, type, "text") is str,
            settle(executor, range, 1, 5),
            settle(executor, fail),
            settle(executor, 5),
            settle(executor, None),
            settle(executor, "text", 1),
        ]


def checks_of_the_constructor(pools: Pools) -> object:
    def construct(*args: Any, **kwargs: Any) -> Any:
        with pools.executor_class(*args, **kwargs):
            return "made"

    def nothing() -> None:
        pass

    context = pools.primitives
    seen = [
        attempt(construct, 0),
        attempt(construct, -1),
        attempt(construct, "two"),
        attempt(construct, True),
        attempt(construct, max_workers=0, initializer=5),
        attempt(construct, 1, context, 5),
        attempt(construct, 1, context, "initializer", ()),
        attempt(construct, 1, context, nothing, ()),
        attempt(construct, initializer=5),
        attempt(construct, 1, context, None, (), 5, 6),
        attempt(construct, workers=1),
    ]
    if sys.version_info >= (3, 11):
        for max_tasks in (0, -1, "ten", 1.5):
            seen.append(attempt(construct, 1, max_tasks_per_child=max_tasks))
        seen.append(attempt(construct, 1, context, max_tasks_per_child=1))
    return seen


def checks_of_submit_and_map(pools: Pools) -> object:
    def consume(*args: Any, **kwargs: Any) -> Any:
        return list(executor.map(*args, **kwargs))

    submit: Callable[..., Any]
    with pools() as executor:
        submit, mapped = executor.submit, executor.map
        seen = [
            attempt(submit),
            attempt(submit, fn=abs),
            attempt(mapped),
            attempt(mapped, abs, 5),
            attempt(mapped, abs, [1], 5),
            attempt(mapped, abs, [1], chunksize=0),
            attempt(mapped, abs, [1], chunksize=-1),
            attempt(mapped, abs, [1], chunksize="x"),
            attempt(mapped, abs, [1], timeout="x"),
            attempt(mapped, abs, [1], unknown=1),
            attempt(consume, abs),
            attempt(consume, fn=abs),
            attempt(consume, abs, []),
            attempt(consume, abs, [-1, 2], chunksize=100),
            attempt(consume, pow, [2, 3], [2, 3, 4]),
            attempt(consume, take_anything, "ab", {1: 2, 3: 4}, range(9)),
            attempt(consume, abs, ["x"]),
            attempt(consume, 5, [1]),
            attempt(consume, abs, [1], timeout=None, chunksize=True),
            attempt(consume, abs, iter([1, -2]), timeout=30),
        ]
        if sys.version_info >= (3, 14):
            for buffersize in (0, -1, 1.5, "x"):
                seen.append(attempt(mapped, abs, [1], buffersize=buffersize))
    return seen


def after_shutdown(pools: Pools) -> object:
    executor = pools()
    seen = [attempt(executor.shutdown, True, True)]  # type: ignore[call-arg]
    executor.submit(abs, 1).result()
    seen.append(executor.shutdown(wait=True, cancel_futures=False))
    seen.append(executor.shutdown(True))
    seen.append(executor.shutdown(False, cancel_futures=True))
    seen += [attempt(executor.submit, abs, 1), attempt(executor.map, abs, [1])]
    seen.append(attempt(lambda: list(executor.map(abs, []))))
    seen.append(attempt(lambda: executor.__enter__() is executor))
    return seen


def signatures(pools: Pools) -> object:
    """Names, kinds and defaults. Those that only this executor has are behind all others, and have to be named."""
    ours = {"ordered", "cancel_running", "progress"}
    seen = []
    for name in ("submit", "map", "shutdown", "__enter__"):
        signature = inspect.signature(getattr(pools.executor_class, name))
        for parameter in signature.parameters.values():
            if parameter.name in ours:
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
            elif parameter.name != "buffersize":  # since Python 3.14
                default = parameter.default if parameter.default is not parameter.empty else "none"
                seen.append((name, parameter.name, parameter.kind.name, default))
    parameters = list(inspect.signature(pools.executor_class).parameters.values())[:4]
    seen += [("__init__", p.name, p.kind.name, p.default) for p in parameters]
    return seen


def initargs_of_any_kind(pools: Pools) -> object:
    """Any iterable, as far as ProcessPoolExecutor takes it."""
    seen = []
    for initargs in ([1, 2], "ab", {1: 2}, ()):
        with pools(initializer=keep, initargs=initargs) as executor:
            seen.append(settle(executor, kept))
    return seen


_kept: Any = None


def keep(*args: Any) -> None:
    global _kept
    _kept = args


def kept() -> Any:
    return _kept


def fail_to_start() -> None:
    raise OSError("no licence")


def failing_initializer(pools: Pools) -> object:
    """Which class of error the calls get, and later ones."""
    from concurrent.futures import BrokenExecutor

    seen = []
    executor = pools(2, initializer=fail_to_start)
    future = executor.submit(abs, 1)
    error = future.exception()
    seen += [isinstance(error, BrokenExecutor)]
    try:
        executor.submit(abs, 1)
        seen.append("accepted")
    except BrokenExecutor:
        seen.append("refused")
    executor.shutdown()
    return seen


def subclasses(pools: Pools) -> object:
    base: Any = pools.executor_class
    context = pools.context

    class Counting(base):  # type: ignore[misc]
        """With a constructor, a submit and attributes of its own."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.submitted = 0
            super().__init__(*args, mp_context=context, **kwargs)

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
            self.submitted += 1
            return super().submit(fn, *args, **kwargs)

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            self.was_shut_down = (wait, cancel_futures)
            super().shutdown(wait, cancel_futures=cancel_futures)

    with Counting(max_workers=2) as executor:
        executor.submit(abs, 1).result()
        mapped = list(executor.map(abs, range(-10, 0), chunksize=5))
        seen = [mapped, executor.submitted, executor._max_workers, hasattr(executor, "made_up")]
    return [*seen, getattr(executor, "was_shut_down", None)]


def unusual_results(pools: Pools) -> object:
    """Errors where an argument or a result does not pickle."""
    import threading

    with pools() as executor:
        lock: Any = threading.Lock()
        seen = [
            settle(executor, abs, lock)[0],
            settle(executor, threading.Lock)[0],
            settle(executor, fail),
        ]
        future = executor.submit(fail)
        error = future.exception()
        assert error is not None and error.__cause__ is not None
        seen.append(describe_error(error))
        seen.append(type(error.__cause__).__name__.strip("_"))
        seen.append("LookupError: not found" in str(error.__cause__))
    return seen
