"""Results as a table on the terminal, as Markdown, and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tests.benchmarks.job import Curve, Job, Ratio, Row, ratio_of, verdict
from tests.benchmarks.measuring import Result

__all__ = ["curve_to_json", "job_to_json", "markdown", "table"]

HEADINGS = ("job", "ours", "other", "ratio", "rounds", "target", "verdict", "beside")


def quantity(value: float, unit: str) -> str:
    """Seconds or bytes, in a unit that reads well."""
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB" if value >= 1e6 else f"{value / 1e3:,.0f} kB"
    for factor, name in ((1, "s"), (1e-3, "ms")):
        if value >= factor:
            return f"{value / factor:.3g} {name}"
    return f"{value * 1e6:.3g} us"


def cells(result: Result, row: Row, instructions: Mapping[str, bool]) -> list[str]:
    """A line of the table."""
    ratio, unit = ratio_of(row, result.costs), result.job.unit
    said = verdict(row, ratio, instructions)
    if differing := result.differs():
        said = f"{said}; {differing}"
    if ratio is None:
        named = (row.subject, *row.against)
        reasons = {**result.left_out, **result.failed}
        why = "; ".join(f"{name}: {reasons[name]}" for name in named if name in reasons)
        return [row.title, "", "", "", "", str(row.bound), said, why or "left out"]
    ours, theirs = (statistics.median(result.costs[name]) for name in (row.subject, ratio.peer))
    spread = f"{ratio.low:.2f}..{ratio.high:.2f}"
    figures = [quantity(ours, unit), quantity(theirs, unit), f"{ratio.value:.2f}", spread]
    return [row.title, *figures, str(row.bound), said, ratio.peer]


def lines_of(results: Sequence[Result], instructions: Mapping[str, bool]) -> list[list[str]]:
    """All lines."""
    return [cells(result, row, instructions) for result in results for row in result.job.rows]


def table(results: Sequence[Result], instructions: Mapping[str, bool], heading: bool = True) -> str:
    """Aligned columns; numbers to the right."""
    lines = lines_of(results, instructions)
    widths = [62, 8, 8, 7, 14, 8, 8, 0]
    shown = []
    for line in [list(HEADINGS), *lines] if heading else lines:
        parts = [
            cell.ljust(width) if index in (0, 6, 7) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        shown.append("  ".join(parts).rstrip())
    return "\n".join(shown)


def markdown(results: Sequence[Result], machine: Mapping[str, Any]) -> str:
    """The table for a README, with the machine below it."""
    lines = lines_of(results, machine["instructions"])
    shown = ["| " + " | ".join(HEADINGS) + " |", "|---|---:|---:|---:|---:|---|---|---|"]
    shown += ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]
    versions = {**machine.get("peer_versions", {}), **machine["versions"]}
    peaks = machine.get("measured", {})
    where = f"{machine['processor']}, {machine['threads']} threads"
    if peaks:
        rates = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in peaks["peak_flops"].items())
        where += f"; measured peaks {rates}, read {peaks['peak_bandwidth'] / 1e9:.1f} GB/s"
    shown += ["", f"{where}. " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".", ""]
    return "\n".join(shown)


def ratio_to_json(row: Row, ratio: Ratio | None, instructions: Mapping[str, bool]) -> dict[str, Any]:
    """A row's figure."""
    found: dict[str, Any] = {"title": row.title, "target": row.target, "verdict": verdict(row, ratio, instructions)}
    if ratio is not None:
        found |= {"ratio": ratio.value, "lowest": ratio.low, "highest": ratio.high, "beside": ratio.peer}
    return found


def job_to_json(result: Result, instructions: Mapping[str, bool]) -> dict[str, Any]:
    """Shapes, every run's cost, and the rows."""
    job: Job = result.job
    return {
        "name": job.name,
        "title": job.title,
        "unit": job.unit,
        "seconds_in_all": round(result.seconds, 2),
        "sides": {
            side.name: {
                "call": side.call,
                "options": dict(side.options),
                "costs": result.costs.get(side.name, []),
                "facts": result.facts.get(side.name, {}),
                **({"left_out": result.left_out[side.name]} if side.name in result.left_out else {}),
                **({"failed": result.failed[side.name]} if side.name in result.failed else {}),
            }
            for side in job.sides
        },
        "rows": [ratio_to_json(row, ratio_of(row, result.costs), instructions) for row in job.rows],
        "differs": result.differs(),
    }


def curve_to_json(curve: Curve, results: Sequence[Result]) -> dict[str, Any]:
    """A panel: labels, and for each line its points; a side that failed has none."""
    drawn = []
    for line in curve.lines:
        points = []
        for point, result in zip(curve.points, results, strict=False):
            costs = [statistics.median(result.costs[name]) for name in line.sides if result.costs.get(name)]
            if costs:
                points.append([point.x, min(costs) * curve.scale / point.per])
        drawn.append({"label": line.label, "points": points})
    labels = {"name": curve.name, "title": curve.title, "x": curve.x, "y": curve.y}
    return {**labels, "lines": drawn, "jobs": [job_to_json(result, {}) for result in results]}
