"""What a benchmark is: sides that run in turn, and the comparisons that are read off them.

A *side* is a function by name, in `ours` or in `peers`, that makes everything ready and returns the work to be timed. A
*job* runs its sides in turn, again and again, so that whatever else the machine does hits all of them. A *row* of the
table compares a side with one or several others: its figure is the median over the rounds of a ratio of two runs that
stood next to each other. Nothing here imports torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Curve", "Job", "Line", "Point", "Ratio", "Row", "Side", "Target", "ratio_of", "verdict"]


@dataclass(frozen=True)
class Side:
    """One of those that run in turn."""

    name: str
    """As the table calls it."""
    call: str
    """`module:function` below `tests.benchmarks.ours` or `tests.benchmarks.peers`, as `peers.language:train`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function; JSON."""

    @property
    def environment(self) -> str:
        """`ours` or `peers`."""
        return "peers" if self.call.startswith("peers.") else "ours"


@dataclass(frozen=True)
class Target:
    """A bound that a figure is held to when somebody reads the table."""

    at_least: bool
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """From `>= 1.5` or `<= 0.5`.

        Raises:
            ValueError: it is neither.
        """
        sign, _, number = text.partition(" ")
        if sign not in (">=", "<="):
            raise ValueError(f"target {text!r}: write '>= 1.5' or '<= 0.5'")
        return cls(sign == ">=", float(number))

    def met(self, figure: float) -> bool:
        """Whether a figure keeps to the bound."""
        return figure >= self.value if self.at_least else figure <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:g}"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    title: str
    subject: str
    """The side that it is about."""
    against: tuple[str, ...]
    """Sides to compare with; of several, the one whose median cost is the lowest."""
    target: str
    """`>= 1.5`: the cost of the others over the subject's. `<= 0.5`: the subject's over that of the others."""
    needs: str = ""
    """An instruction set (`bf16`) without which the target says nothing about the code."""

    @property
    def bound(self) -> Target:
        return Target.parse(self.target)


@dataclass
class Job:
    """What is measured together."""

    name: str
    title: str
    sides: Sequence[Side]
    rows: Sequence[Row] = ()
    repeats: int = 3
    process: str = ""
    """Jobs of one name share a process in each environment: libraries keep state of a run's precision. `fresh`: every
    side has its own, as a figure for memory needs."""
    once: bool = False
    """Without a warm-up: what is measured is no time, or takes minutes."""
    same: str = ""
    """A fact of the runs that must agree between the sides of every row, such as `loss`."""
    tolerance: float = 0.0
    unit: str = "s"
    """Of a cost: `s` or `bytes`."""


@dataclass(frozen=True)
class Point:
    """A job at one place of a curve."""

    x: float
    job: Job
    per: float = 1.0
    """How many things (tokens, completions) a cost is for."""


@dataclass(frozen=True)
class Line:
    """A side of a curve's jobs as it is drawn; of several sides the lowest."""

    label: str
    sides: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """A panel of the picture: cost against something."""

    name: str
    title: str
    x: str
    y: str
    points: Sequence[Point]
    lines: Sequence[Line]
    scale: float = 1.0
    """What a cost is multiplied with before it is drawn, as 1000 for milliseconds."""


@dataclass(frozen=True)
class Ratio:
    """The figure of a row, and how far single rounds lie from it."""

    value: float
    low: float
    high: float
    peer: str


def ratio_of(row: Row, costs: Mapping[str, Sequence[float]]) -> Ratio | None:
    """Median, smallest and largest of the ratios of runs of one round; None where a side is missing."""
    found = [name for name in row.against if costs.get(name)]
    if not found or not costs.get(row.subject):
        return None
    peer = min(found, key=lambda name: statistics.median(costs[name]))
    pairs = zip(costs[row.subject], costs[peer], strict=False)
    ratios = [theirs / ours if row.bound.at_least else ours / theirs for ours, theirs in pairs]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), peer)


def verdict(row: Row, ratio: Ratio | None, instructions: Mapping[str, bool]) -> str:
    """`met`, `below` or `above` the bound, `not on this machine (...)`, or `not measured`."""
    if ratio is None:
        return "not measured"
    if row.bound.met(ratio.value):
        return "met"
    if row.needs and not instructions.get(row.needs, True):
        return f"not on this machine (no {row.needs} instructions)"
    return "below" if row.bound.at_least else "above"
