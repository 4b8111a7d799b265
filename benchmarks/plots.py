"""The plots of `compare.py`: rates against duration and payload, latency, cancel."""

import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contenders import OURS
from metrics import DURATIONS, PAYLOADS, Sizes, short

importlib.import_module("matplotlib").use("Agg")
plt: Any = importlib.import_module("matplotlib.pyplot")

#: {metric: {contender: value}}
Medians = dict[str, dict[str, float]]

_OURS_STYLE = {"color": "black", "linewidth": 2.5, "marker": "o", "zorder": 3}
_MARKERS = "sv^D<>pPX*hd"


def write_plots(medians: Medians, names: list[str], sizes: Sizes, directory: Path) -> None:
    """Write rate.png, payload.png, arrays.png, latency.png and cancel.png, as far as there are figures for them."""
    directory.mkdir(parents=True, exist_ok=True)
    points = [("submit", "nothing"), *((f"calls of {label}", f"sleep {label}") for label in DURATIONS)]
    possible = [None, *(sizes.workers / duration_s for duration_s in DURATIONS.values())]
    _curves(medians, names, points, "what a call does", "calls/s", directory / "rate.png", possible)
    points = [(f"echo of {label}", label) for label in PAYLOADS]
    _curves(medians, names, points, "bytearray that a call copies and returns", "MB/s", directory / "payload.png")
    panels = [
        ("numpy array of 100 MB\nthat comes back, s", ["echo of an array"]),
        ("one array of 100 MB\nto 20 calls, s", ["array to 20 calls"]),
    ]
    _bars(medians, panels, directory / "arrays.png")
    panels = [("round trip of one call, us; pale: 99th percentile", ["round trip p50", "round trip p99"])]
    _bars(medians, panels, directory / "latency.png")
    panels = [
        (
            f"cancel {sizes.workers} running sleeps, until\na next result, ms; pale: slowest",
            ["cancel p50", "cancel max"],
        ),
        (f"cancel {sizes.queued:,} queued calls,\ns", ["cancel of queued"]),
    ]
    _bars(medians, panels, directory / "cancel.png")


def _styles(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return how each contender is drawn, the same in all plots."""
    peers = [name for name in names if name != OURS]
    colors = plt.get_cmap("tab10").colors
    styles = {
        name: {"color": colors[index % 10], "linewidth": 1.2, "marker": _MARKERS[index % len(_MARKERS)]}
        for index, name in enumerate(peers)
    }
    return {**styles, OURS: _OURS_STYLE}


def _curves(
    medians: Medians,
    names: list[str],
    points: list[tuple[str, str]],
    x_label: str,
    y_label: str,
    path: Path,
    possible: Sequence[float | None] = (),
) -> None:
    """Draw a line for each contender over points (metric, label), and a dotted one for what is possible."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    lines = {}
    for name in names:
        found = [(x, medians[metric][name]) for x, (metric, _) in enumerate(points) if name in medians.get(metric, {})]
        if found:
            lines[name] = axes.plot(*zip(*found, strict=True), markersize=5, label=name, **_styles(names)[name])[0]
    if not lines:
        plt.close(figure)
        return
    ranked = sorted(lines, key=lambda name: -lines[name].get_ydata()[0])  # as the curves begin, from above
    handles = [lines[name] for name in ranked]
    limits = [(x, value) for x, value in enumerate(possible) if value is not None]
    if limits:
        handles += axes.plot(*zip(*limits, strict=True), color="gray", linestyle=":")
        ranked.append("possible")
    axes.set_xticks(range(len(points)), [label for _, label in points])
    axes.set(yscale="log", xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend(handles, ranked, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _bars(medians: Medians, panels: list[tuple[str, list[str]]], path: Path) -> None:
    """Draw for each panel, a label and metrics, the contenders from best to worst."""
    panels = [(label, metrics) for label, metrics in panels if medians.get(metrics[0])]
    if not panels:
        return
    figure, grid = plt.subplots(1, len(panels), figsize=(8, 3.8), squeeze=False)
    for axes, (label, metrics) in zip(grid[0], panels, strict=True):
        names = sorted(medians[metrics[0]], key=lambda name: -medians[metrics[0]][name])
        height = 0.8 / len(metrics)
        every = [medians[metric][name] for metric in metrics for name in names if name in medians[metric]]
        for index, metric in enumerate(metrics):
            known = [(place - height * index, name) for place, name in enumerate(names) if name in medians[metric]]
            values = [medians[metric][name] for _, name in known]
            colors = ["black" if name == OURS else "tab:blue" for _, name in known]
            places = [place for place, _ in known]
            bars = axes.barh(places, values, height=height, color=colors, alpha=1.0 if index == 0 else 0.4)
            axes.bar_label(bars, [f" {short(value)}" for value in values], fontsize=7)
        axes.set_yticks([place - height * (len(metrics) - 1) / 2 for place in range(len(names))], names, fontsize=8)
        axes.set(xscale="log", xlabel=label)
        low, high = min(every) / 3, max(every)
        axes.set_xlim(low, high * (high / low) ** (0.12 * len(panels)))  # room for the figures
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write it with few colours, which makes it small."""
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, dpi=110)
    plt.close(figure)
    pillow = importlib.import_module("PIL.Image")
    pillow.open(image).convert("RGB").quantize(64).save(path, optimize=True)
