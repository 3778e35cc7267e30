"""Tiny data files of every kind, in the columns that the data modules read, and a reward that needs no data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_palm.testing.batches import DataKind

__all__ = ["lower_case", "write_rows"]

WORDS = ["the", "cat", "sat", "on", "a", "warm", "mat", "and", "saw", "nine", "small", "birds", "fly", "over", "trees"]


def lower_case(completions: list[str]) -> list[float]:
    """Lower-case letters and shortness: a reward that differs between completions of a network that writes any byte."""
    return [sum(c.islower() for c in text) - 0.1 * len(text) for text in completions]


def sentence(number: int) -> str:
    """A text of two to seven words."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(2 + number % 6))


def row_of(data: DataKind, number: int) -> dict[str, Any]:
    """A row of a data file, in the columns that the data modules read."""
    prompt, answer = sentence(number)[: 3 + number % 7], " " + sentence(number + 3)
    if data == "pairs":
        return {"prompt": prompt, "chosen": answer, "rejected": " " + sentence(number + 5), "margin": number % 3 + 1.0}
    if data == "rankings":
        answers = [" " + sentence(number + 5 * k) for k in range(2 + number % 3)]
        return {
            "prompt": prompt,
            "completions": answers,
            "ranks": [k // 2 if k > 1 else k for k in range(len(answers))],
        }
    if data == "prompts":
        return {"prompt": prompt}
    more: dict[str, Any] = {}
    if data in ("ratings", "unpaired"):
        more = {"rating": number % 5 - 2.0} if data == "ratings" else {"label": number % 3 != 0}
    return {"prompt": prompt, "completion": answer, **more}


def write_rows(data: DataKind, path: Path, count: int = 12) -> str:
    """Write a tiny data file of a kind."""
    rows = [json.dumps(row_of(data, i)) + "\n" for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(rows), encoding="utf-8")
    return str(path)
