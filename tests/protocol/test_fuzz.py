"""The decoders of the network, fed by a fuzzer that looks for new branches; see fuzz_decoders.py."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.atheris
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris is not installed")
def test_decoders():
    """A hundred thousand inputs cause nothing but RemoteProtocolError."""
    script = Path(__file__).with_name("fuzz_decoders.py")
    done = subprocess.run([sys.executable, script, "-runs=100000", "-rss_limit_mb=512"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
