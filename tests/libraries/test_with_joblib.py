"""joblib's backend "scaler", alone and below scikit-learn."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from calls import Record, Wrong, fail, sleep_long, square

from scaler_executor import ScalerExecutor, WorkerDiedError

Library = Callable[[str], ModuleType]


@pytest.fixture(scope="module", autouse=True)
def end() -> Iterator[None]:
    """The workers that joblib's calls have left for the next ones end with the module."""
    yield
    adapter = sys.modules.get("scaler_executor.adapters.joblib")
    if adapter is not None:
        adapter._kept.drop()
        gc.collect()


@pytest.fixture
def joblib(library: Library) -> ModuleType:
    joblib = library("joblib")
    import scaler_executor.adapters.joblib  # noqa: F401 - registers the backend

    return joblib


@pytest.fixture(params=["own", "given"])
def configured(request: pytest.FixtureRequest, joblib: ModuleType) -> Iterator[Any]:
    """A block with the backend, with workers of its own or those of an executor."""
    options = {} if request.param == "own" else {"executor": request.getfixturevalue("executor")}
    with joblib.parallel_config("scaler", n_jobs=2, **options):
        yield joblib


def where(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def test_results_in_order(configured: Any) -> None:
    """As many as one likes, in batches whose size joblib decides, in two workers."""
    found = configured.Parallel()(configured.delayed(where)(number) for number in range(3000))
    assert [square for square, _ in found] == [number * number for number in range(3000)]
    pids = {pid for _, pid in found}
    assert 1 <= len(pids) <= 2 and os.getpid() not in pids


def test_generators(configured: Any) -> None:
    """`return_as`, both ways; one that is dropped early has its calls stopped."""
    calls = [configured.delayed(square)(number) for number in range(40)]
    assert list(configured.Parallel(return_as="generator")(calls)) == [number * number for number in range(40)]
    unordered = configured.Parallel(return_as="generator_unordered")
    assert sorted(unordered(calls)) == [number * number for number in range(40)]
    sleeps = [configured.delayed(sleep_long)() for _ in range(4)]
    generator = configured.Parallel(return_as="generator")([configured.delayed(square)(3), *sleeps])
    assert next(generator) == 9
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        del generator
        gc.collect()
    assert "have been cancelled" in str(said[0].message)
    assert configured.Parallel()(calls) == [number * number for number in range(40)]
    assert time.monotonic() - start < 60


def test_dropped_generator_spares_the_next(configured: Any) -> None:
    """A generator that is collected while another one's calls run stops its own."""
    sleeps = [configured.delayed(sleep_long)() for _ in range(2)]
    first = configured.Parallel(return_as="generator")(sleeps)
    second = configured.Parallel(return_as="generator")([configured.delayed(where)(number) for number in range(9)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        del first
        gc.collect()
    assert [square for square, _ in second] == [number * number for number in range(9)]


@pytest.mark.parametrize("how", ["exception", "death", "timeout"])
def test_abort(how: str, configured: Any, record: Record) -> None:
    """What ends a Parallel stops the calls that run, and their workers take the next ones."""
    first, options, error = {
        "exception": (configured.delayed(record.after_start(fail))(), {}, Wrong),
        "death": (configured.delayed(record.after_start(os._exit))(3), {}, WorkerDiedError),
        "timeout": (configured.delayed(sleep_long)(), {"timeout": 0.5}, multiprocessing.TimeoutError),
    }[how]
    start = time.monotonic()
    sleep = configured.delayed(record.watched(sleep_long))()
    with pytest.raises(error):
        configured.Parallel(batch_size=1, **options)([sleep, first, sleep, sleep])
    assert not record.running() and (record.pids() or how == "timeout")
    assert configured.Parallel()([configured.delayed(square)(3)] * 5) == [9] * 5
    assert time.monotonic() - start < 60


def test_reused(configured: Any) -> None:
    """One Parallel for several calls, also after one of them has failed."""
    with configured.Parallel(batch_size=1) as parallel:
        assert parallel([configured.delayed(square)(2)] * 3) == [4] * 3
        with pytest.raises(Wrong):
            parallel([configured.delayed(sleep_long)(), configured.delayed(fail)()])
        assert parallel([configured.delayed(square)(3)] * 3) == [9] * 3


def test_workers_stay(joblib: Any) -> None:
    """The next Parallel finds the workers of the last one."""
    pids = []
    for _ in range(3):
        found = joblib.Parallel(2, backend="scaler")(joblib.delayed(where)(number) for number in range(8))
        pids += [pid for _, pid in found]
    assert len(set(pids)) <= 2


def test_nested(configured: Any) -> None:
    """A Parallel within a call uses threads of its worker."""

    def inner(number: int) -> tuple[set[int], int]:
        from joblib import Parallel, delayed

        found = Parallel(n_jobs=2)(delayed(where)(number) for _ in range(4))
        return {pid for _, pid in found}, os.getpid()

    for pids, pid in configured.Parallel()(configured.delayed(inner)(number) for number in range(4)):
        assert pids == {pid} != {os.getpid()}


def test_no_more_than_jobs(joblib: Any, tmp_path: Path) -> None:
    """Of an executor with more workers no more are used at once than there are jobs."""

    def count(number: int) -> int:
        own = tmp_path / str(number)
        own.touch()
        time.sleep(0.05)
        at_once = len(list(tmp_path.iterdir()))
        own.unlink()
        return at_once

    def meet(number: int, parties: int) -> None:
        (tmp_path / f"party{number}").touch()
        while len(list(tmp_path.glob("party*"))) < parties:
            time.sleep(0.005)

    with ScalerExecutor(4) as executor, joblib.parallel_config("scaler", executor=executor):
        assert joblib.effective_n_jobs() == joblib.effective_n_jobs(-1) == joblib.effective_n_jobs(9) == 4
        assert joblib.effective_n_jobs(-2) == 3
        calls = [joblib.delayed(count)(number) for number in range(12)]
        assert max(joblib.Parallel(2, pre_dispatch="all", batch_size=1)(calls)) <= 2
        joblib.Parallel(batch_size=1)(joblib.delayed(meet)(number, 4) for number in range(4))
        assert executor.submit(square, 3).result() == 9


def test_threads_of_libraries(joblib: Any, library: Library) -> None:
    """`inner_max_num_threads`, of workers that the backend starts."""
    library("threadpoolctl")

    def threads() -> set[int]:
        import numpy  # noqa: F401
        import threadpoolctl

        return {pool["num_threads"] for pool in threadpoolctl.threadpool_info()}

    calls = [joblib.delayed(threads)()] * 4
    for count in (2, 1):
        with joblib.parallel_config("scaler", n_jobs=2, inner_max_num_threads=count):
            assert joblib.Parallel()(calls) == [{count}] * 4
    with ScalerExecutor(2) as executor, pytest.raises(AssertionError, match="inner_max_num_threads"):
        joblib.parallel_config("scaler", executor=executor, inner_max_num_threads=2)


def test_large_arrays(configured: Any) -> None:
    """Arrays go through shared memory, and each call may change its own."""
    import numpy as np

    def change(array: Any, number: int) -> float:
        array[0] += number
        return float(array[0])

    array = np.zeros(1_000_000)
    assert configured.Parallel()(configured.delayed(change)(array, number) for number in range(6)) == list(range(6))
    assert array[0] == 0


def test_broken_executor(joblib: Any) -> None:
    """An executor that takes no more calls is an error and no hang; one of the backend's own is replaced."""
    with ScalerExecutor(2) as executor:
        pass
    with joblib.parallel_config("scaler", executor=executor), pytest.raises(RuntimeError, match="after shutdown"):
        joblib.Parallel(pre_dispatch="all", batch_size=1)([joblib.delayed(square)(3)] * 3000)
    with joblib.parallel_config("scaler", n_jobs=2):
        assert joblib.Parallel()([joblib.delayed(square)(3)] * 4) == [9] * 4
        from scaler_executor.adapters.joblib import _kept

        assert _kept._executor is not None
        _kept._executor.kill_workers()
        with pytest.raises(RuntimeError):
            joblib.Parallel()([joblib.delayed(square)(3)] * 4)
        assert joblib.Parallel()([joblib.delayed(square)(3)] * 4) == [9] * 4


def test_served_cluster(joblib: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the environment names a cluster, its workers are used, as many as it has."""
    adapter = sys.modules["scaler_executor.adapters.joblib"]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "scaler_executor", "serve", "--workers", "3", "--bind", "tcp://127.0.0.1:*"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as serve:
        try:
            assert serve.stdout is not None
            said = []
            while not said or b"join it" not in said[-1]:
                said.append(serve.stdout.readline())
                assert said[-1], said
            connection = tmp_path / "scaler-executor" / "default" / "connection.json"
            monkeypatch.setenv("SCALER_EXECUTOR_ADDRESS", str(connection))
            with joblib.parallel_config("scaler"):
                assert joblib.effective_n_jobs() == 3
                found = joblib.Parallel()(joblib.delayed(where)(number) for number in range(100))
            assert [square for square, _ in found] == [number * number for number in range(100)]
            executor = adapter._kept.take(None, None)
            assert executor.max_workers == 3
            adapter._kept.drop()
            executor.shutdown()
        finally:
            serve.terminate()


# scikit-learn


def test_grid_search(configured: Any, library: Library) -> None:
    """The same scores and the same best as with joblib's own backend."""
    library("sklearn")
    from sklearn.datasets import load_iris
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import SVC

    data, target = load_iris(return_X_y=True)

    def search() -> Any:
        return GridSearchCV(SVC(), {"C": [0.1, 1, 10], "kernel": ["linear", "rbf"]}, cv=3).fit(data, target)

    ours = search()
    with configured.parallel_config("loky", n_jobs=2):
        theirs = search()
    assert (ours.cv_results_["mean_test_score"] == theirs.cv_results_["mean_test_score"]).all()
    assert ours.best_params_ == theirs.best_params_


def test_forest_and_scores(configured: Any, library: Library) -> None:
    """A forest, and scores of one, which nests a Parallel in another."""
    library("sklearn")
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import cross_val_score

    data, target = load_iris(return_X_y=True)

    def run() -> tuple[Any, Any]:
        forest = RandomForestClassifier(20, random_state=1, n_jobs=2)
        return forest.fit(data, target).predict_proba(data), cross_val_score(forest, data, target, cv=4, n_jobs=2)

    ours = run()
    with configured.parallel_config("loky", n_jobs=2):
        theirs = run()
    assert (ours[0] == theirs[0]).all() and (ours[1] == theirs[1]).all()


FORKS = """
import multiprocessing
from scaler_executor import ScalerExecutor
import numpy
from sklearn.ensemble import HistGradientBoostingRegressor

data = numpy.random.default_rng(1).random((2000, 5))

def fit(_):
    return HistGradientBoostingRegressor(max_iter=5).fit(data, data.sum(axis=1)).score(data, data.sum(axis=1)) > 0.2

assert fit(0)  # by OpenMP's threads
with ScalerExecutor(mp_context=multiprocessing.get_context("fork")) as executor:
    print(list(executor.map(fit, range(4))))
"""


def test_fork_of_a_process_that_has_used_openmp(library: Library, tmp_path: Path) -> None:
    """A worker that is told to use one thread does not wait for those that its fork has not inherited."""
    library("sklearn")
    (tmp_path / "forks.py").write_text(FORKS)
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, str(tmp_path / "forks.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout == "[True, True, True, True]\n", done


def test_configuration_goes_along(configured: Any, library: Library) -> None:
    """scikit-learn's settings and the filters of warnings hold in the calls, as it sees to."""
    sklearn = library("sklearn")
    from sklearn.utils.parallel import Parallel, delayed

    def look() -> tuple[bool, list[str]]:
        import sklearn

        return sklearn.get_config()["assume_finite"], [entry[0] for entry in warnings.filters]

    with sklearn.config_context(assume_finite=True), warnings.catch_warnings():
        warnings.simplefilter("error", BytesWarning)
        for is_finite, filters in Parallel()(delayed(look)() for _ in range(4)):
            assert is_finite and filters[0] == "error"


def test_failing_fits(configured: Any, library: Library) -> None:
    """A fit that kills its worker ends the search; the next search works."""
    library("sklearn")
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.datasets import load_iris
    from sklearn.model_selection import cross_val_score

    class Deadly(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
        def fit(self, data: Any, target: Any) -> Any:
            os._exit(3)

    data, target = load_iris(return_X_y=True)
    with pytest.raises(WorkerDiedError):
        cross_val_score(Deadly(), data, target)
    from sklearn.naive_bayes import GaussianNB

    assert cross_val_score(GaussianNB(), data, target).mean() > 0.9
