"""Compare ScalerExecutor with ProcessPoolExecutor and others: rates, latency, CPU time, memory, cancel, crashes.

    python benchmarks/compare.py --quick
    python benchmarks/compare.py --json figures.json
    python benchmarks/compare.py --all --json figures.json --markdown table.md --plots .

All contenders are measured in the same run, in turn, round after round, so that a machine's changing mood hits each of
them, and each in fresh processes (see metrics.py), so that none has what another has imported or left behind. A cell is
the median over the rounds; a ratio, the thing to look at, is the median of the ratios of single rounds.

With --all, so are ThreadPoolExecutor, multiprocessing.Pool, and what is installed of other libraries, and there are
more metrics; the plots need matplotlib: `pip install -e '.[benchmarks]'`. A cell without a figure says why, below the
table in full: "cannot", the type of an error, "dies" where the measuring process died, or the limit of time after
which it was given up and killed, and not tried again.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from contenders import CONTENDERS, FORK, OURS, SPAWN, all_contenders, versions
from metrics import (
    FIRST_GROUPS,
    GROUPS,
    LEFT_OPEN,
    MB,
    METRICS,
    NEED_NUMPY,
    QUICK,
    Figure,
    Sizes,
    measure,
    short,
    without_measuring,
)
from processes import adopt_orphans, await_none_left, watch

#: {contender: {metric: figure}}
Round = dict[str, dict[str, Figure]]


class Cells(TypedDict):
    """What is known of one metric."""

    #: {contender: value}
    median: dict[str, float]
    #: {contender: why it has no value, or what was found that is no number}
    said: dict[str, str]
    #: {contender: its value over that of ProcessPoolExecutor with fork}
    to_fork: dict[str, float]
    #: {peer: our value over the peer's}
    ratio: dict[str, float]


#: By metric, in the order of the table.
Summary = dict[str, Cells]


class Comparison:
    """Measures, and remembers what went wrong."""

    def __init__(self, names: list[str], groups: list[str], sizes: Sizes) -> None:
        self.names = names
        self.groups = groups
        self.sizes = sizes
        self.rounds: list[Round] = []
        #: {contender and group: what went wrong there}
        self.failures: dict[str, str] = {}
        #: Those (contender, group) that took too long, and what is to be said of them in later rounds.
        self._given_up: dict[tuple[str, str], dict[str, Figure]] = {}

    def run(self) -> None:
        """Measure everything in each round: a group of all contenders, then the next group."""
        for number in range(self.sizes.rounds):
            found: Round = {name: {} for name in self.names}
            turn = number % len(self.names)  # nobody always goes first
            for group in self.groups:
                print(f"round {number + 1} of {self.sizes.rounds}, {group}:", end="", file=sys.stderr, flush=True)
                for name in self.names[turn:] + self.names[:turn]:
                    print(f" {name}", end="", file=sys.stderr, flush=True)
                    found[name].update(self._measure(name, group))
                print(file=sys.stderr, flush=True)
            self.rounds.append(found)

    def _measure(self, name: str, group: str) -> dict[str, Figure]:
        """Measure one group of one contender, in a process of its own."""
        known = without_measuring(group, all_contenders()[0][name])
        known = self._given_up.get((name, group)) if known is None else known
        if known is not None:
            return known
        with tempfile.TemporaryDirectory() as directory:
            output, log = Path(directory, "output"), Path(directory, "log")
            output.touch()
            arguments = ["--measure", group, name, json.dumps(asdict(self.sizes)), str(output)]
            paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
            with log.open("wb") as stream:
                process = subprocess.Popen(
                    [sys.executable, __file__, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                )
                seen, reason = self._await(process, group == "memory")
            left = await_none_left(10 if process.returncode == 0 and reason is None and group not in LEFT_OPEN else 0)
            found = {**seen, **dict(map(json.loads, output.read_text().splitlines()))}
            what = f"{name}, {group}"
            if "error" in found:
                self.failures[what] = str(found["error"])
                reason = str(found.pop("error")).partition(":")[0]
            elif reason == "dies":
                said = log.read_text(errors="replace").strip().splitlines()[-1:]
                self.failures[what] = ": ".join([f"died with exit code {process.returncode}", *said])
            elif reason is not None:
                self.failures[what] = f"given up after {self.sizes.limit_s:g} s"
            elif left and group not in LEFT_OPEN:
                self.failures[f"{what}, afterwards"] = f"{len(left)} processes were left after ten seconds, and killed"
        if reason is not None:
            found = {**{metric: reason for metric in METRICS if METRICS[metric].group == group}, **found}
        if reason is not None and reason.startswith("over"):
            self._given_up[name, group] = {metric: value for metric, value in found.items() if isinstance(value, str)}
        return found

    def _await(self, process: "subprocess.Popen[bytes]", watched: bool) -> tuple[dict[str, Figure], str | None]:
        """Return what can be seen from outside, and what went wrong, if anything."""
        peak = peak_shared = 0
        deadline_s = time.monotonic() + self.sizes.limit_s
        if watched:
            peak, peak_shared = watch(process.pid, lambda: process.poll() is not None or time.monotonic() > deadline_s)
        try:
            status = process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            return {}, f"over {self.sizes.limit_s:g} s"
        if status != 0:
            return {}, "dies"
        return {"peak memory": peak / MB, "peak shared memory": peak_shared / MB} if peak else {}, None


def measure_here(group: str, name: str, sizes: Sizes, output: Path) -> None:
    """Measure a group of metrics of one contender in this process, and write a line for each as soon as it is known."""
    with output.open("w") as stream:

        def record(metric: str, value: Figure) -> None:
            stream.write(json.dumps([metric, value]) + "\n")
            stream.flush()

        try:
            measure(group, all_contenders()[0][name], sizes, record)
        except Exception as error:
            record("error", f"{type(error).__name__}: {error}"[:500])
            os._exit(1)  # what failed may never close


def summarize(rounds: list[Round]) -> Summary:
    """Return the medians and ratios of all metrics that somebody has."""
    summary: Summary = {}
    for metric in METRICS:
        found = {name: [figures[name][metric] for figures in rounds if metric in figures[name]] for name in rounds[0]}
        medians: dict[str, float] = {}
        said: dict[str, str] = {}
        for name, figures in found.items():
            if numbers := [figure for figure in figures if not isinstance(figure, str)]:
                medians[name] = statistics.median(numbers)
            if texts := [figure for figure in figures if isinstance(figure, str)]:
                said[name] = " or ".join(sorted(set(texts)))
                if numbers:
                    said[name] = f"{said[name]} in {len(texts)} of {len(rounds)}"
        ranked = list(medians) if METRICS[metric].compared else []
        if medians or said:
            summary[metric] = {
                "median": medians,
                "said": said,
                "to_fork": {name: ratio for name in ranked if (ratio := _ratio(rounds, metric, name, FORK))},
                "ratio": {name: ratio for name in ranked if (ratio := _ratio(rounds, metric, OURS, name))},
            }
    return summary


def _ratio(rounds: list[Round], metric: str, one: str, other: str) -> float | None:
    """Return the median of the ratios of single rounds, None if there is none."""
    ratios = []
    for figures in rounds:
        above, below = figures.get(one, {}).get(metric), figures.get(other, {}).get(metric)
        if one != other and isinstance(above, float) and isinstance(below, float) and below > 0:
            ratios.append(above / below)
    return statistics.median(ratios) if ratios else None


def _label(metric: str, sizes: Sizes) -> str:
    return METRICS[metric].label.format(**asdict(sizes))


def _unit(metric: str) -> str:
    unit = METRICS[metric].unit
    return f"{unit} {'↑' if METRICS[metric].more_is_better else '↓'}" if unit else ""


def print_table(summary: Summary, names: list[str], sizes: Sizes) -> None:
    """Print the medians, and the ratios to the standard library's, one metric a line."""
    peers = [peer for peer in (FORK, SPAWN) if peer in names]
    print(f"{'':62}" + "".join(f"{name:>21}" for name in names) + "".join(f"{f'to {peer}':>21}" for peer in peers))
    for metric, cells in summary.items():
        label = ", ".join(filter(None, [_label(metric, sizes).replace("`", ""), _unit(metric)]))
        row = [f"{_cell(cells, name)[:19]:>21}" for name in names]
        row += [f"{_times(cells['ratio'].get(peer)):>21}" for peer in peers]
        print(f"{label:62}" + "".join(row))
    print(f"↑ more is better, ↓ less is better; ratios are those of {OURS}")


def _cell(cells: Cells, name: str) -> str:
    """Return a figure, or why there is none."""
    parts = []
    if name in cells["median"]:
        parts.append(short(cells["median"][name]))
    if name in cells["said"]:
        parts.append(cells["said"][name])
    return ", ".join(parts) or "-"


def markdown(
    summary: Summary,
    names: list[str],
    sizes: Sizes,
    environment: dict[str, object],
    notes: list[str],
) -> str:
    """Return the medians as a table, each with its ratio to ProcessPoolExecutor's with fork."""
    in_process = [name for name, contender in all_contenders()[0].items() if contender.in_process]
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for metric, cells in summary.items():
        more = METRICS[metric].more_is_better
        numbers = cells["median"]
        rivals = [value for name, value in numbers.items() if name not in in_process]
        best = (max if more else min)(rivals) if len(rivals) > 1 and METRICS[metric].compared else None
        row = []
        for name in names:
            cell = _cell(cells, name)
            if name not in in_process and numbers.get(name) == best is not None:
                cell = f"**{cell}**"
            if (ratio := cells["to_fork"].get(name)) is not None:
                cell += f" ({ratio:.2g}x)"
                if name == OURS and (ratio < 0.95 if more else ratio > 1.05):
                    cell += " *worse*"
            row.append(cell)
        lines.append(
            f"| {_label(metric, sizes)}{', ' if METRICS[metric].unit else ''}{_unit(metric)} | {' | '.join(row)} |"
        )
    lines += [
        "",
        f"Medians over rounds ({sizes.rounds}), {sizes.workers} workers each; ↑ more is better, ↓ less is better. In "
        f"brackets: to {FORK}, the median of the rounds' ratios. Bold: the best of its line, threads aside; *worse*: "
        f"{OURS} is behind {FORK}. " + ", ".join(f"{key} {value}" for key, value in environment.items()) + ".",
    ]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def environment() -> dict[str, object]:
    """Return what the figures depend on: the machine, Python, versions."""
    processor = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor,
        "cores": os.cpu_count() or 0,
        "usable cores": len(os.sched_getaffinity(0)),
        "memory": f"{memory / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        **versions(),
        "load at the start": f"{os.getloadavg()[0]:.1f}",
    }


def _parse() -> tuple[Sizes, argparse.Namespace]:
    parser = argparse.ArgumentParser(description="Compare ScalerExecutor with ProcessPoolExecutor and others.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer calls: a glance, not a measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds and the summary there")
    parser.add_argument("--all", action="store_true", help="all contenders that are installed, and all metrics")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="GROUP", help=f"only these: {', '.join(GROUPS)}")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    parser.add_argument("--plots", type=Path, metavar="DIRECTORY", help="write plots there, as PNG")
    parser.add_argument("--one-cpu", action="store_true", help="pin everything to one CPU: no waking of another core")
    parser.add_argument("--rounds", type=int, metavar="N", help="how often each contender is measured")
    parser.add_argument("--calls", type=int, metavar="N", help="how many calls are submitted at once")
    parser.add_argument("--limit", type=float, metavar="S", help="seconds after which one group of one is given up")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    given = {"rounds": arguments.rounds, "calls": arguments.calls, "limit_s": arguments.limit}
    overrides = {key: value for key, value in given.items() if value is not None}
    return Sizes(**{**asdict(QUICK if arguments.quick else Sizes()), **overrides}), arguments


def main() -> None:
    """Measure, print the table, and write the figures if asked to."""
    sizes, arguments = _parse()
    if arguments.measure:
        group, name, given, output = arguments.measure
        measure_here(group, name, Sizes(**json.loads(given)), Path(output))
        return
    if arguments.one_cpu:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    about = environment()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    adopt_orphans()

    contenders, missing = all_contenders()
    names = list(contenders if arguments.all else CONTENDERS)
    groups = [group for group in GROUPS if group in (arguments.only or (GROUPS if arguments.all else FIRST_GROUPS))]
    comparison = Comparison(names, groups, sizes)
    comparison.run()

    notes = [f"{name} is not installed" for name in missing] if arguments.all else []
    if "numpy" not in about and set(groups) & set(NEED_NUMPY):
        notes.append("numpy is not installed, so nothing was measured with arrays")
    notes += [f"{what}: {why}" for what, why in comparison.failures.items()]
    summary = summarize(comparison.rounds)
    print_table(summary, names, sizes)
    for note in notes:
        print(note)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(summary, names, sizes, about, notes))
    if arguments.json:
        report = {
            "environment": about,
            "notes": notes,
            "sizes": asdict(sizes),
            "summary": summary,
            "rounds": comparison.rounds,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    if arguments.plots:
        from plots import write_plots

        write_plots({metric: cells["median"] for metric, cells in summary.items()}, names, sizes, arguments.plots)
    if any(what.startswith(OURS) for what in comparison.failures):
        sys.exit(f"{OURS} failed")


if __name__ == "__main__":
    main()
