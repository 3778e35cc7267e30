"""An inspection as text for a terminal. What is learned from stands in brackets: the prompt⟦the answer⟧."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any, TextIO

from lit_palm.data.sources import has_splits
from lit_palm.inspection.measuring import Inspection, Segment

__all__ = ["show"]

SHOWN = 700
"""So many characters of a row are shown, half of them from its end."""
BRACKETS = ("\u27e6", "\u27e7")


def show(inspection: Inspection, rows: int, out: TextIO) -> None:
    """Print an inspection.

    Args:
        inspection: what there is to say.
        rows: how many elements are shown.
        out: where to.
    """
    width = max(shutil.get_terminal_size((120, 24)).columns, 60)
    opening, closing = BRACKETS if _writes(out, BRACKETS[0]) else ("[[", "]]")
    for line in _head(inspection):
        print(line, file=out)
    _list("left out", inspection.left_out, width, out)
    _list("faults", inspection.faults, width, out)
    _list("notes", inspection.notes, width, out)
    measured = {f"{name}, characters": found for name, found in inspection.characters().items()}
    measured |= {f"{name}, tokens": found for name, found in inspection.tokens().items()}
    print(f"\n{'lengths':28}{'min':>9}{'median':>9}{'p95':>9}{'max':>9}", file=out)
    for name, found in measured.items():
        print(f"  {name:26}" + "".join(f"{value:9,}" for value in found), file=out)
    if inspection.limit is not None:
        print(f"  the longest row may have {inspection.limit:,} tokens", file=out)
    shown = inspection.rows(rows)
    if shown:
        kind = "as trained on" if inspection.elements is not None else "as read, before the chat template"
        learned = any(segment.learned for row in shown for segment in row["segments"])
        print(f"\nrows, {kind}" + (f"; learned from is what stands in {opening}{closing}" if learned else ""), file=out)
    before = None
    for number, row in enumerate(shown, 1):
        known = ", ".join(f"{name} {_short(value)}" for name, value in row.items() if name != "segments")
        print(f"\n[{number}]" + (f" {known}" if known else ""), file=out)
        segments = row["segments"]
        if "rank" in row and segments[0] == before:
            segments = [Segment("(the same prompt) ", False), *segments[1:]]
        before = row["segments"][0]
        print(textwrap.indent(_marked(segments, opening, closing), "    ", lambda line: True), file=out)


def _head(inspection: Inspection) -> list[str]:
    data, stage = inspection.data, inspection.stage
    source, split = data.sources[stage]
    assert source is not None, "an inspection has a source"
    reader = f", read by {type(data.reader).__name__} as {data.view}" if data.reader is not None else ""
    used = f"{inspection.num_samples:,} {_unit(inspection)}"
    if inspection.num_answers:
        used += f" with {inspection.num_answers:,} answers"
    in_splits = has_splits(source) if data.reader is None else data.reader.has_splits(source)
    place = f"{source} ({split})" if in_splits else source
    lines = [f"{type(data).__name__}, {stage}: {place}{reader}", ""]
    others = inspection.elements is not None and len(inspection.elements) != inspection.num_samples
    lines += [f"rows read   {inspection.rows_read:,}", f"{'parsed' if others else 'used':12}{used}"]
    if others:
        packed = getattr(data, "pack", False)
        lines.append(f"trained on  {len(inspection.elements):,} {'packed rows' if packed else 'of them'}")
    return lines


def _unit(inspection: Inspection) -> str:
    one = inspection.num_samples == 1
    name = {"demonstrations": "demonstration", "preferences": "prompt", "prompts": "prompt"}
    unit = name.get(inspection.data.view or "", "document")
    return unit if one else unit + "s"


def _list(title: str, lines: list[str], width: int, out: TextIO) -> None:
    if lines:
        print(f"\n{title}", file=out)
    for line in lines:
        print(textwrap.fill(line, width, initial_indent="  ", subsequent_indent="    "), file=out)


def _marked(segments: list[Segment], opening: str, closing: str) -> str:
    """The text of a row with brackets; of a long one the beginning and the end."""
    text = "".join(f"{opening}{s.text}{closing}" if s.learned else s.text for s in segments).rstrip("\n")
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]} ... ({len(text) - 2 * half:,} characters) ... {text[-half:]}"


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    text = text.replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def _writes(out: TextIO, character: str) -> bool:
    """Whether the terminal's encoding has a character."""
    try:
        character.encode(getattr(out, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
