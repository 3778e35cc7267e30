"""Rows that are not as they should be: noted when data is tokenised, reported whenever it is used.

What is noted is kept with the tokenised data in the cache, so that a second run says the same as the first:

    note(writer, "overlong", "dropped", "reviews.jsonl:12")     # while writing
    report(columns, {"overlong": "longer than 512 tokens (data.overlong)"})

A fault has one or several outcomes ("dropped", "kept", ...), each counted, with the first few places. What a reader of
published data leaves out is counted in the same way (`count`), by its reasons in words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_palm.data.cache import Columns, ColumnWriter
from lit_palm.data.sources import Row

__all__ = ["count", "counted", "leaver", "note", "overlong_fault", "report"]

PLACES = 5
"""So many places are named; the others are counted."""


def note(writer: ColumnWriter, fault: str, outcome: str, where: str) -> None:
    """Count a row with a fault.

    Args:
        writer: of the tokenised data.
        fault: a key of what `report` is given.
        outcome: what became of the row, in words that follow a number of rows: "dropped".
        where: its place, "file:line".
    """
    count(writer.meta.setdefault("faults", {}), fault, outcome, where)


def count(tally: dict[str, Any], fault: str, outcome: str, where: str) -> None:
    """Count a row with a fault in a tally, a dictionary of JSON values; see `note`."""
    found = tally.setdefault(fault, {}).setdefault(outcome, {"count": 0, "places": []})
    found["count"] += 1
    if len(found["places"]) < PLACES:
        found["places"].append(where)


def leaver(tally: dict[str, Any]) -> Callable[[Row, str], None]:
    """What a reader calls for a row that it leaves out, with the reason."""
    return lambda row, reason: count(tally, reason, "left out", row.where)


def counted(tally: Mapping[str, Any], faults: Mapping[str, str] | None = None) -> list[str]:
    """A line for each fault of a tally, with what became of its rows.

    Args:
        tally: from `count`.
        faults: what each fault is called, and in which order they come; None: as they are.
    """
    names = {fault: fault for fault in tally} if faults is None else faults
    return [f"{text}: {_outcomes(tally[fault])}" for fault, text in names.items() if fault in tally]


def overlong_fault(longest: int | None) -> str:
    """What a row that is too long is called in reports."""
    return f"longer than {longest} tokens (data.overlong)"


def report(columns: Columns, faults: Mapping[str, str]) -> None:
    """Warn once, on the first process, of everything that was noted; nothing is lost in silence.

    Args:
        columns: from the cache.
        faults: what each fault is, with the option that decides about it.

    Raises:
        ValueError: when no row is left.
    """
    lines = counted(columns.meta.get("faults", {}), faults)
    if "tokens" not in columns.arrays:
        raise ValueError("no row is left of the data; " + "; ".join(lines) + ": correct the data or change the option")
    if lines:
        rank_zero_warn("the data has rows with faults\n" + "\n".join(f"  {line}" for line in lines))


def _outcomes(outcomes: Mapping[str, Mapping[str, object]]) -> str:
    return "; ".join(_outcome(name, found) for name, found in outcomes.items())


def _outcome(name: str, found: Mapping[str, object]) -> str:
    count, places = found["count"], found["places"]
    assert isinstance(count, int) and isinstance(places, list)
    more = f" and {count - len(places)} more" if count > len(places) else ""
    return f"{count} {'row' if count == 1 else 'rows'} {name} ({_listed(places)}{more})"


def _listed(places: Sequence[str]) -> str:
    """Places one after the other, a file's name once for all its lines: "a.jsonl:2, 5, b.jsonl:1"."""
    listed, last = [], None
    for place in places:
        line = re.fullmatch(r"(.*):(\d+)", place)
        listed.append(line[2] if line and line[1] == last else place)
        last = line[1] if line else None
    return ", ".join(listed)
