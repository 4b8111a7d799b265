"""The plots of `compare.py`: rates against duration and payload, latency, cancel."""

import importlib
from pathlib import Path
from typing import Any

from contenders import OURS
from metrics import DURATIONS, METRICS, PAYLOADS, Sizes

importlib.import_module("matplotlib").use("Agg")
plt: Any = importlib.import_module("matplotlib.pyplot")

#: {metric: {contender: value}}
Medians = dict[str, dict[str, float]]

_OURS_STYLE = {"color": "black", "linewidth": 2.5, "marker": "o", "zorder": 3}
_MARKERS = "sv^D<>pPX*hd"


def write_plots(medians: Medians, names: list[str], sizes: Sizes, directory: Path) -> None:
    """Write rate.png, payload.png, latency.png and cancel.png, as far as there are figures for them."""
    directory.mkdir(parents=True, exist_ok=True)
    points = [("submit", 1e-6), *((f"calls of {label}", duration_s) for label, duration_s in DURATIONS.items())]
    _curves(medians, names, points, "a call sleeps, s (the first does nothing)", "calls/s", directory / "rate.png")
    points = [(f"echo of {label}", float(size_bytes)) for label, (size_bytes, _) in PAYLOADS.items()]
    label = "bytearray that a call copies and returns, bytes"
    _curves(medians, names, points, label, "MB/s, both ways", directory / "payload.png")
    _bars(medians, [("round trip of one call, us", ["round trip p50", "round trip p99"])], directory / "latency.png")
    panels = [
        (f"cancel {sizes.workers} running sleeps,\nuntil a next result, ms", ["cancel p50", "cancel max"]),
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
    medians: Medians, names: list[str], points: list[tuple[str, float]], x_label: str, y_label: str, path: Path
) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5))
    lines = {}
    for name in names:
        found = [(x, medians[metric][name]) for metric, x in points if name in medians.get(metric, {})]
        if found:
            lines[name] = axes.plot(*zip(*found, strict=True), markersize=5, label=name, **_styles(names)[name])[0]
    if not lines:
        plt.close(figure)
        return
    axes.set(xscale="log", yscale="log", xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    ranked = sorted(lines, key=lambda name: -lines[name].get_ydata()[0])  # as the curves begin, from above
    axes.legend([lines[name] for name in ranked], ranked, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
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
        for index, metric in enumerate(metrics):
            places = [place - height * index for place in range(len(names))]
            values = [medians[metric].get(name, 0.0) for name in names]
            colors = ["black" if name == OURS else "tab:blue" for name in names]
            bars = axes.barh(places, values, height=height, color=colors, alpha=1.0 if index == 0 else 0.4)
            axes.bar_label(
                bars, [f" {value:,.3g}" if value < 1e4 else f" {value:,.0f}" for value in values], fontsize=7
            )
        axes.set_yticks([place - height * (len(metrics) - 1) / 2 for place in range(len(names))], names, fontsize=8)
        axes.set(xscale="log", xlabel=label)
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * (high / low) ** 0.15)  # room for the figures
        if len(metrics) > 1:
            said = " and, pale, ".join(METRICS[metric].label.rpartition(", ")[2] for metric in metrics)
            axes.set_title(said if "round trip" in metrics[0] else "median and, pale, slowest", fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
