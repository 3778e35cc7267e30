"""The curves of bench.json as one picture.

    python -m tests.benchmarks.picture runs/bench/bench.json runs/bench/bench.png

Needs matplotlib and nothing else, so that either environment can draw.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

COLUMNS = 3
INK, FAINT = "#26262e", "#c9c9d2"
COLOURS = {"lit_palm": "#1f5fd0", "transformers": "#d1641e", "palm-rlhf-pytorch": "#8a6d1d", "litgpt": "#3c8a4e"}


def number(value: float, _: object = None) -> str:
    """As short as it can be: 512, 2k, 131k, 30M; 0.5."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of every decade between two values, or 1 alone where that would be many."""
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 1.6 else (1, 3) if decades < 3 else (1,)
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]


def gaps(panel: dict[str, Any]) -> str:
    """How many times ours the other costs, from the first place to the last where both were measured."""
    if len(panel["lines"]) < 2:
        return ""
    ours, other = (dict(map(tuple, line["points"])) for line in panel["lines"][:2])
    both = sorted(set(ours) & set(other))
    if not both:
        return ""
    ratios = (other[x] / ours[x] for x in (both[0], both[-1]))
    first, last = (f"{ratio:{'.2g' if ratio < 10 else '.0f'}}\N{MULTIPLICATION SIGN}" for ratio in ratios)
    return f"; {panel['lines'][1]['label']} takes {first if len(both) == 1 else f'{first} to {last}'} ours"


def draw_panel(axes: Any, panel: dict[str, Any]) -> None:
    """One curve and its lines, named where they end."""
    lines = [line for line in panel["lines"] if line["points"]]
    ends = sorted((line["points"][-1][1], line["label"]) for line in lines)
    values = [y for line in lines for _, y in line["points"]]
    places = sorted({x for line in lines for x, _ in line["points"]})
    low, high = min(values) / 1.35, max(values) * 1.35
    axes.set(xscale="log", yscale="log", ylim=(low, high))
    for line in lines:
        colour, ours = COLOURS.get(line["label"], INK), line["label"] == "lit_palm"
        x, y = zip(*line["points"], strict=True)
        axes.plot(
            x, y, color=colour, linewidth=2.4 if ours else 1.6, marker="o", markersize=5 if ours else 4,
            zorder=3 if ours else 2, clip_on=False,
        )  # fmt: skip
        # names of lines that end close together are pushed apart
        close = len(ends) > 1 and ends[1][0] / ends[0][0] < (high / low) ** 0.08
        shift = 0 if not close else (-7 if (y[-1], line["label"]) == ends[0] else 7)
        axes.annotate(
            line["label"], (x[-1], y[-1]), xytext=(9, shift), textcoords="offset points", color=colour, va="center",
            fontsize=9, fontweight="bold" if ours else "normal", annotation_clip=False,
        )  # fmt: skip
    axes.set_title(panel["title"], loc="left", fontsize=11, fontweight="bold", color=INK, pad=20)
    axes.text(0, 1.03, panel["y"] + gaps(panel), transform=axes.transAxes, fontsize=9, color="#5c5c66")
    axes.set_xlabel(panel["x"], fontsize=9, color=INK)
    axes.set_xticks(places, [number(x) for x in places])
    axes.set_yticks(found := ticks(low, high), [number(y) for y in found])
    axes.minorticks_off()
    axes.grid(axis="y", color=FAINT, linewidth=0.6, alpha=0.7)
    axes.tick_params(length=0, labelsize=9, colors=INK)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(FAINT)


def draw(figures: dict[str, Any], path: Path) -> None:
    """All panels that have points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [curve for curve in figures["curves"] if any(line["points"] for line in curve["lines"])]
    if not panels:
        raise SystemExit("nothing to draw: no curve has a point")
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 3.7 * rows + 0.7), squeeze=False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw_panel(axes, panel)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    machine = figures["machine"]
    where = f"{machine['processor']}, {machine['threads']} threads, float32; logarithmic axes, lower is better"
    figure.text(0.012, 0.012, where, fontsize=8.5, color="#5c5c66")
    figure.tight_layout(rect=(0.0, 0.03, 0.985, 1.0), w_pad=5.5, h_pad=2.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")


def main() -> None:
    """From a file to a file."""
    source, target = map(Path, sys.argv[1:3])
    draw(json.loads(source.read_text(encoding="utf-8")), target)


if __name__ == "__main__":
    main()
