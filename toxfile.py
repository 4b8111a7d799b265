"""Let tox find the interpreters of pyenv, also those that are not activated: it looks for them on PATH only."""

import os
from pathlib import Path

_root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
_bins = sorted(_root.glob("versions/*/bin"))
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, _bins)])
