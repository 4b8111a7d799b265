"""Each test gets a client over a fake scheduler, and leaves no thread and no descriptor behind."""

import gc
import os
import threading
from collections.abc import Iterator

import pytest
from fake_scheduler import Setting


@pytest.fixture
def setting() -> Iterator[Setting]:
    gc.collect()
    threads = set(threading.enumerate())
    descriptors = set(os.listdir("/proc/self/fd"))
    setting = Setting()
    yield setting
    setting.close()
    assert setting.scheduler.joined
    assert set(threading.enumerate()) <= threads
    assert len(os.listdir("/proc/self/fd")) <= len(descriptors)
