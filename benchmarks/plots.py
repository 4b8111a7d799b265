"""The plots of `compare.py`: rates against duration and payload, latency, cancel."""

import importlib
from pathlib import Path
from typing import Any

importlib.import_module("matplotlib").use("Agg")
plt: Any = importlib.import_module("matplotlib.pyplot")

Summary = dict[str, dict[str, dict[str, float]]]


def write_plots(
    summary: Summary,
    durations: list[tuple[str, float]],
    payloads: list[tuple[str, tuple[int, int]]],
    directory: Path,
) -> None:
    """Write rate.png, payload.png, latency.png and cancel.png."""
    directory.mkdir(parents=True, exist_ok=True)
    names = list(summary["submit"]["median"])
    points = [("submit", 1e-6), *((f"calls of {label}", duration_s) for label, duration_s in durations)]
    _curves(summary, names, points, "a call sleeps, s (the first does nothing)", "calls/s", directory / "rate.png")
    points = [(f"echo of {label}", float(size_bytes)) for label, (size_bytes, _) in payloads]
    _curves(summary, names, points, "argument that comes back, bytes", "MB/s, both ways", directory / "payload.png")
    _bars(summary, ["round trip p50", "round trip p99"], "us", directory / "latency.png")
    _bars(summary, ["cancel p50", "cancel max"], "ms from cancel to a next result", directory / "cancel.png")


def _curves(
    summary: Summary, names: list[str], points: list[tuple[str, float]], x_label: str, y_label: str, path: Path
) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name in names:
        found = [(x, summary[metric]["median"][name]) for metric, x in points if name in summary[metric]["median"]]
        axes.plot(*zip(*found, strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    axes.legend(fontsize=8)
    _save(figure, path)


def _bars(summary: Summary, metrics: list[str], y_label: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    names = [name for name in summary["submit"]["median"] if name in summary[metrics[0]]["median"]]
    for index, metric in enumerate(metrics):
        places = [place + 0.4 * index for place in range(len(names))]
        axes.bar(places, [summary[metric]["median"][name] for name in names], width=0.4, label=metric)
    axes.set_xticks([place + 0.2 for place in range(len(names))], names, rotation=30, ha="right", fontsize=8)
    axes.set(yscale="log", ylabel=y_label)
    axes.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
