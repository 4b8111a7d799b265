"""Real programs that make a ProcessPoolExecutor, run with and without `scaler-executor run`: all they leave is equal.

Each runs twice on the same files: exit code, output and every file afterwards are compared. That the pool was a
ScalerExecutor, and was used, is read from the record that recorder/sitecustomize.py makes of both runs.
"""

import importlib.util
import marshal
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

RECORDER = Path(__file__).parent / "recorder"
BIN = sysconfig.get_path("scripts")
STDLIB = Path(sysconfig.get_path("stdlib"))


@dataclass
class Left:
    """What a run has left behind."""

    code: int
    out: str
    err: str
    files: dict[str, Any]
    #: What the pools were, and how often each method of theirs was called.
    record: Counter[str]


def run(arguments, folder: Path, prepare, *, is_swapped: bool) -> Left:
    """Run a tool in a folder that is made for it and removed afterwards."""
    work = folder / "work"
    shutil.rmtree(folder, ignore_errors=True)
    work.mkdir(parents=True)
    prepare(work)
    record = folder / "record"
    record.touch()
    environment = {
        **os.environ,
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(RECORDER), os.environ.get("PYTHONPATH")])),
        "POOL_RECORD": str(record),
        # Caches and settings: none of the user's, none of the run before.
        "HOME": str(folder),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "120",
    }
    if is_swapped:
        command = [sys.executable, "-m", "scaler_executor", "run", *arguments]
    elif arguments[0] == "-m" or arguments[0].endswith(".py"):
        command = [sys.executable, *arguments]
    else:
        command = [os.path.join(BIN, arguments[0]), *arguments[1:]]
    finished = subprocess.run(
        command, cwd=work, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100
    )
    return Left(
        code=finished.returncode,
        out=finished.stdout,
        err=finished.stderr,
        files={str(path.relative_to(work)): read(path) for path in work.rglob("*") if path.is_file()},
        record=Counter(record.read_text().splitlines()),
    )


def read(path: Path):
    """Return what is in a file; of byte code its header and code, for the references in it depend on what else the
    compiler's process had in memory."""
    data = path.read_bytes()
    return (data[:16], marshal.loads(data[16:])) if path.suffix == ".pyc" else data


def check(tmp_path, arguments, prepare, *, code=0, is_ordered=True, ignored="$^") -> Left:
    """Run a tool without and with the swap. Return what it left, the same both times.

    Args:
        tmp_path: The test's folder.
        arguments: The tool and its arguments.
        prepare: Writes the files that it works on into a folder.
        code: The exit code that it should have.
        is_ordered: Whether it writes its lines in an order that does not depend on which worker is quicker.
        ignored: Lines with this in them say how long something took or which process did it.
    """
    without = run(arguments, tmp_path / "run", prepare, is_swapped=False)
    swapped = run(arguments, tmp_path / "run", prepare, is_swapped=True)
    assert without.code == code, without.out + without.err
    assert (swapped.code, swapped.files) == (without.code, without.files), swapped.err
    for ours, theirs in [(swapped.out, without.out), (swapped.err, without.err)]:
        lines = [[line for line in text.splitlines() if not re.search(ignored, line)] for text in (ours, theirs)]
        if not is_ordered:
            lines = [sorted(part) for part in lines]
        assert lines[0] == lines[1]
    pools = {
        "concurrent.futures.process.ProcessPoolExecutor": without,
        "scaler_executor.executor.ScalerExecutor": swapped,
    }
    for base, left in pools.items():
        assert {line.split()[0] for line in left.record} == {base}
        assert left.record[f"{base} submit"] + left.record[f"{base} map"] > 0
    made = [left.record[f"{base} __init__"] for base, left in pools.items()]
    assert made[0] == made[1] > 0
    return without


def needs(*modules):
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}; see the extra 'tools'")


def copy_sources(work: Path, *, is_broken: bool = False) -> None:
    """Copy some modules of the standard library to src/, with one that does not compile if asked."""
    for package in ["json", "wsgiref"]:
        for path in sorted(STDLIB.joinpath(package).glob("*.py")):
            target = work / "src" / package / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    if is_broken:
        (work / "src" / "broken.py").write_text("def f(:\n")


def copy_broken(work: Path) -> None:
    copy_sources(work, is_broken=True)


def test_compileall(tmp_path):
    """The standard library's compileall: the same byte code, the same complaint about a file that does not compile."""
    arguments = ["-m", "compileall", "-q", "-j", "2", "-f", "--invalidation-mode", "checked-hash", "src"]
    left = check(tmp_path, arguments, copy_broken, code=1)
    assert sum(name.endswith(".pyc") for name in left.files) > 10 and "broken.py" in left.out


@needs("black")
def test_black(tmp_path):
    """black, which drives its pool from asyncio."""
    left = check(tmp_path, ["black", "--workers", "2", "src"], copy_broken, code=123, is_ordered=False)
    assert "files reformatted" in left.err


@needs("black")
def test_black_on_a_module_path(tmp_path):
    """The same by `-m`, with nothing to write."""
    left = check(tmp_path, ["-m", "black", "--check", "-l", "100", "src"], copy_sources, code=1, is_ordered=False)
    assert "would be reformatted" in left.err


@needs("pylint", "dill")
def test_pylint(tmp_path):
    """pylint -j, which sends its linter by dill to an initializer."""
    left = check(tmp_path, ["pylint", "-j", "2", "--exit-zero", "src/json", "src/wsgiref"], copy_sources)
    assert "rated at" in left.out


@needs("yapf")
def test_yapf(tmp_path):
    """yapf --parallel."""
    left = check(tmp_path, ["yapf", "--parallel", "--in-place", "--recursive", "src"], copy_sources)
    assert left.files["src/json/decoder.py"] != STDLIB.joinpath("json", "decoder.py").read_bytes()


@needs("usort")
def test_usort(tmp_path):
    """usort, over trailrunner."""
    left = check(tmp_path, ["usort", "format", "src"], copy_sources, is_ordered=False)
    assert "Sorted" in left.out


@needs("ufmt")
def test_ufmt(tmp_path):
    """ufmt, over trailrunner: black and usort in one."""
    left = check(tmp_path, ["ufmt", "format", "src"], copy_sources, is_ordered=False)
    assert "Formatted" in left.out + left.err


@needs("libcst")
def test_libcst(tmp_path):
    """libcst's codemod -j."""
    codemod = "convert_percent_format_to_fstring.ConvertPercentFormatStringCommand"
    arguments = ["-m", "libcst.tool", "codemod", "--jobs=2", "--hide-progress", codemod, "src"]
    left = check(tmp_path, arguments, copy_sources, is_ordered=False)
    assert "Transformed" in left.err


@needs("unimport")
def test_unimport(tmp_path):
    """unimport --jobs."""

    def add_imports(work):
        copy_sources(work)
        (work / "src" / "idle.py").write_text("import os, sys\nfrom json import loads, dumps\nprint(loads, sys)\n")

    left = check(tmp_path, ["unimport", "--jobs", "2", "--check", "--diff", "src"], add_imports, code=1)
    assert "-import os, sys" in left.out


@needs("djlint")
def test_djlint(tmp_path):
    """djlint, whose workers are set up by an initializer."""

    def write_templates(work):
        for number in range(8):
            text = f"<div><p>{number}</p>{{% if a %}}<img src='x'>{{% endif %}}</div>\n"
            (work / f"page{number}.html").write_text(text * 400)

    left = check(tmp_path, ["djlint", "--reformat", "--quiet", "."], write_templates, code=1, is_ordered=False)
    assert left.files["page0.html"].count(b"\n") > 3
    check(tmp_path, ["djlint", "--lint", "."], write_templates, code=1, is_ordered=False)


@needs("reuse")
def test_reuse(tmp_path):
    """reuse lint: its pool maps over chunks of files."""
    left = check(tmp_path, ["reuse", "lint"], copy_sources, code=1, is_ordered=False)
    assert "no copyright and licensing information" in left.out.lower()


@needs("tqdm")
@pytest.mark.parametrize(
    "method",
    ["fork", "spawn"],
)
def test_tqdm(tmp_path, method):
    """tqdm's process_map, whose initializer takes a lock that the workers share."""

    def write_script(work):
        (work / "script.py").write_text(f"""\
import multiprocessing
from tqdm.contrib.concurrent import process_map

def square(number):
    return number * number

if __name__ == "__main__":
    multiprocessing.set_start_method("{method}")
    print(process_map(square, range(100), max_workers=2, chunksize=5, disable=True))
""")

    assert "9801]" in check(tmp_path, ["script.py"], write_script).out


@needs("adaptive")
def test_adaptive(tmp_path):
    """adaptive's runner, which asks the pool for its number of workers."""

    def write_script(work):
        (work / "script.py").write_text("""\
import adaptive, concurrent.futures

def square(number):
    return number * number

if __name__ == "__main__":
    learner = adaptive.SequenceLearner(square, range(40))
    with concurrent.futures.ProcessPoolExecutor(2) as executor:
        adaptive.BlockingRunner(learner, goal=adaptive.SequenceLearner.done, executor=executor)
    print(learner.result())
""")

    assert "1521]" in check(tmp_path, ["script.py"], write_script).out


@needs("pypdfium2", "PIL")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pypdfium2(tmp_path, method):
    """pypdfium2 render, by each start method."""
    import pypdfium2

    def write_document(work):
        document = pypdfium2.PdfDocument.new()
        for number in range(6):
            document.new_page(100 + number, 150)
        document.save(work / "document.pdf")

    write_document(tmp_path)
    data = (tmp_path / "document.pdf").read_bytes()

    def copy_document(work):
        (work / "document.pdf").write_bytes(data)
        (work / "pages").mkdir()

    arguments = ["pypdfium2", "render", "document.pdf", "-o", "pages", "--parallel-lib", "ft", "--linear", "1"]
    arguments += ["--processes", "2", "--parallel-strategy", method]
    left = check(tmp_path, arguments, copy_document, is_ordered=False, ignored="process|lazy")
    assert len(left.files) == 7
