"""What a call leaves behind: arguments, results and futures are freed when ProcessPoolExecutor frees them."""

from __future__ import annotations

import pytest
from programs import run
from support import Scene

#: {case: program}, in which `gone(reference)` waits a while for an object to be freed. The collector is off.
CASES = {
    "argument": """
value = workload.Weak()
reference = weakref.ref(value)
future = executor.submit(workload.get_type, value)
future.result()
del value
print(gone(reference))
""",
    "arguments of cancelled calls": """
value = workload.Weak()
reference = weakref.ref(value)
for _ in range(3):
    executor.submit(time.sleep, 0.2)
futures = [executor.submit(workload.get_type, value) for _ in range(10)]
print(futures[-1].cancel())
del value
wait(futures)
print(gone(reference))
""",
    "function": """
bound = workload.Weak().get_self
reference = weakref.ref(bound.__self__)
future = executor.submit(bound)
future.result()
del bound
print(gone(reference))
""",
    "result": """
future = executor.submit(workload.Weak)
reference = weakref.ref(future.result())
print(reference() is future.result())
del future
print(gone(reference))
""",
    "result in a callback": """
references = []
executor.submit(workload.Weak).add_done_callback(lambda future: references.append(weakref.ref(future.result())))
print(waits_for(lambda: references), gone(references[0]))
""",
    "results of a map": """
references = []
for value in executor.map(workload.make_weak, range(5)):
    references.append(weakref.ref(value))
    del value
    print(all(map(gone, references)))
""",
    "results of as_completed": """
references = []
futures = [executor.submit(workload.Weak) for _ in range(5)]
completed = as_completed(futures)
del futures
for future in completed:
    references.append(weakref.ref(future.result()))
    del future
    print(all(map(gone, references)))
""",
    "exception": """
future = executor.submit(workload.raise_weak)
reference = weakref.ref(future.exception())
del future
print(gone(reference))
""",
    "exception that was raised": """
def caught():
    future = executor.submit(workload.raise_weak)
    try:
        future.result()
    except workload.WeakError as error:
        return weakref.ref(error), weakref.ref(future)
error, future = caught()
print(gone(error), gone(future))
""",
    "future": """
future = executor.submit(abs, 1)
future.result()
reference = weakref.ref(future)
del future
print(gone(reference))
""",
    "future with a callback": """
future = executor.submit(abs, 1)
future.add_done_callback(lambda done, keep=workload.Weak(): None)
reference = weakref.ref(future)
future.result()
del future
print(gone(reference))
""",
    "argument and result in the worker": """
for _ in range(3):
    executor.submit(workload.make_weak, workload.Weak()).result()
    list(executor.map(workload.make_weak, [workload.Weak(), workload.Weak()]))
executor.submit(workload.fail_with, workload.Weak()).exception()
print(executor.submit(workload.count_weak).result())
""",
    "executor": """
one = make(1)
one.submit(abs, 1).result()
reference = weakref.ref(one)
del one
print(gone(reference))
one = make(1)
futures = [one.submit(abs, 1)]
results = one.map(abs, [1])
reference = weakref.ref(one)
del one
print(gone(reference), list(results))
""",
    "arguments of the initializer": """
one = make(1, initializer=workload.get_type, initargs=(workload.Weak(),))
one.submit(abs, 1).result()
one.shutdown()
print(waits_for(lambda: not workload.count_weak()))
""",
}
HELPERS = """
import weakref
gc.disable()
def waits_for(condition):
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return bool(condition())
def gone(reference):
    return waits_for(lambda: reference() is None)
executor = make(1)
"""


@pytest.mark.parametrize("case", CASES)
def test_references(scene: Scene, start_method: str, case: str) -> None:
    """What ProcessPoolExecutor frees without the help of the collector is freed."""
    ours, standard = [run(scene, kind, start_method, HELPERS + CASES[case]) for kind in ("scaler", "standard")]
    assert (ours.code, ours.stderr) == (0, "")
    assert ours.stdout == standard.stdout
