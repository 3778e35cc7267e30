"""The report as plain text, at most 100 columns wide: `print(render(report))` with what `build_report` returned."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["WIDTH", "render"]

WIDTH = 100


def render(report: Mapping[str, Any]) -> str:
    """The whole report for a terminal."""
    parts = [
        _title("Held-out measurements"),
        _columns([[name, _number(value, 3)] for name, value in _scalars(report)]),
        _title(f"{report['num_prompts']} held-out prompts, ratings of the judge from -4 to 4"),
        _systems(report["systems"]),
        _title("Prompts, chosen by a hash"),
        _examples(report["examples"]),
        _title("Targets"),
        _columns([_target(item) for item in report["checks"]]),
    ]
    met = sum(item["passed"] for item in report["checks"])
    parts.append(f"\n{met} of {len(report['checks'])} targets met.")
    return "\n".join(parts)


def _scalars(report: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    stages = {"pretrain": "bits per byte after pre-training", "finetune": "bits per byte after fine-tuning"}
    rows = [(label, report["language_model"][stage]) for stage, label in stages.items()]
    return rows + [(f"pair accuracy, {name}", value) for name, value in report["reward_model"].items()]


def _systems(systems: Mapping[str, Mapping[str, float]]) -> str:
    rows = [["", "judge", "gain", "95% interval", "KL", "distinct-2", "of start", "length", "of start", "ended"]]
    for name, row in systems.items():
        changed = "gain" in row
        rows.append([
            name[:18],
            _number(row["judge"], 2, sign=True),
            _number(row["gain"], 2, sign=True) if changed else "",
            f"{row['gain_low']:+.2f} to {row['gain_high']:+.2f}" if changed else "",
            _number(row["kl"], 2),
            _number(row["distinct_2"], 3),
            _number(row["distinct_2_ratio"], 2) if changed else "",
            _number(row["length"], 1),
            _number(row["length_ratio"], 2) if changed else "",
            f"{row['ended']:.0%}",
        ])  # fmt: skip
    return _columns(rows)


def _target(item: Mapping[str, Any]) -> list[str]:
    low, high, above = item["low"], item["high"], item["above"]
    if low is not None and high is not None:
        wanted = f"{low:g} to {high:g}"
    elif above is not None:
        wanted = f"above {above:g}"
    else:
        wanted = f"at least {low:g}" if low is not None else f"at most {high:g}"
    digits = 0 if isinstance(item["value"], int) else 3
    return [item["name"], _number(item["value"], digits), wanted, "PASS" if item["passed"] else "MISS"]


def _examples(examples: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for example in examples:
        lines.append(f"  {_one_line(example['prompt'])}")
        width = max(len(name[:18]) for name in example)
        for name, row in example.items():
            if name != "prompt":
                label = f"    {name[:18]:<{width}} {row['judge']:+.2f}  "
                lines += textwrap.wrap(
                    "..." + _one_line(row["completion"]),
                    WIDTH,
                    initial_indent=label,
                    subsequent_indent=" " * len(label),
                )
    return "\n".join(lines)


def _one_line(text: str) -> str:
    """Printable on one line: control characters would move the terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in " ".join(text.split()))


def _number(value: float | None, digits: int, sign: bool = False) -> str:
    return "not measured" if value is None else f"{value:{'+' if sign else ''}.{digits}f}"


def _title(text: str) -> str:
    return f"\n{text}\n{'-' * len(text)}"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(["", first.lstrip().ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)
