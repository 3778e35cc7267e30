"""Anthropic's dialogues of a human and an assistant (Bai et al. 2022, "Training a Helpful and Harmless Assistant")."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Literal

from lit_palm.data.readers.base import Drop, Reader, View, distinct
from lit_palm.data.readers.places import Hub
from lit_palm.data.sources import Row
from lit_palm.data.templates import Message

__all__ = ["HHRLHF", "SPEAKER", "hh_messages", "shared_turns"]

Subset = Literal["harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"]

SPEAKER = re.compile(r"\s*(Human|Assistant): ?")
_TURNS = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh_messages(text: str) -> list[Message]:
    """The turns of a dialogue written as "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    _, *parts = _TURNS.split(text)
    return [{"role": _ROLES[r], "content": c.strip()} for r, c in zip(parts[::2], parts[1::2], strict=True)]


def shared_turns(chosen: list[Message], rejected: list[Message]) -> int:
    """How many turns two dialogues begin with alike; the last turn of each is its own."""
    same = 0
    while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
        same += 1
    return same


class HHRLHF(Reader):
    """Anthropic/hh-rlhf: rows of `chosen` and `rejected`, each a whole dialogue.

    preferences: the turns that both dialogues begin with, and how each goes on. demonstrations: the chosen dialogue
    (the authors say that these data are for preference models, not for fine-tuning). prompts: the shared turns.

    Args:
        subset: one of the dataset's four parts; None: all of them.
    """

    def __init__(self, subset: Subset | None = None) -> None:
        self.subset = subset

    @property
    def hub(self) -> Hub:
        return Hub("Anthropic/hh-rlhf", data_dir=self.subset)

    def splits(self, view: View) -> Mapping[str, str]:
        return {"train": "train", "validation": "test", "test": "test"}

    def preferences(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row, chosen, rejected in self._pairs(rows, drop):
            same = shared_turns(chosen, rejected)
            columns = {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}
            yield Row(row.where, columns, chosen[0]["content"])

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row, chosen, _ in self._pairs(rows, drop):
            yield Row(row.where, {"messages": chosen}, chosen[0]["content"])

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        pairs = self._pairs(rows, drop)
        found = ((row, chosen[: shared_turns(chosen, rejected)]) for row, chosen, rejected in pairs)
        yield from distinct((Row(row.where, {"prompt": p}, p[0]["content"]) for row, p in found), drop)

    def _pairs(self, rows: Iterator[Row], drop: Drop) -> Iterator[tuple[Row, list[Message], list[Message]]]:
        for row in rows:
            chosen, rejected = self._dialogue(row, "chosen"), self._dialogue(row, "rejected")
            fault = _fault(chosen) or _fault(rejected)
            if fault is None and shared_turns(chosen, rejected) % 2 == 0:
                fault = "the two dialogues differ in what the human says"
            if fault is None:
                yield row, chosen, rejected
            else:
                drop(row, fault)

    def _dialogue(self, row: Row, name: str) -> list[Message]:
        text = self.field(row, name, str)
        if not SPEAKER.match(text):
            raise self.off(row, name, str, f"does not begin with 'Human:' ({text!r:.60})")
        return hh_messages(text)


def _fault(dialogue: list[Message]) -> str | None:
    roles = [turn["role"] for turn in dialogue]
    if roles[0] != "user":
        return "a dialogue does not begin with the human"
    if roles[-1] != "assistant":
        return "a dialogue does not end with the assistant"
    if any(a == b for a, b in pairwise(roles)):
        return "one speaker has two turns in a row"
    return None
