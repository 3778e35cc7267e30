"""Answers that say nothing about what people prefer: empty ones, and equal ones of different rank.

Both are found in the token ids, after the chat template, so that a string and the message that means the same are
equal. What is taken out of a ranking of several answers leaves the others; a prompt with no two answers left to choose
between is left out as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lit_palm.data.cache import ColumnWriter
from lit_palm.data.conversations import Encoded
from lit_palm.data.faults import note
from lit_palm.data.preference_formats import Answer, Group
from lit_palm.data.tokenizers import Tokenizer

__all__ = ["FAULTS", "AnswerCheck", "Faulty"]

Faulty = Literal["error", "drop", "keep"]

FAULTS = {
    "empty": "an answer is empty, nothing but EOS or white space (data.empty)",
    "identical": "the same answer was ranked differently (data.identical)",
}


class AnswerCheck:
    """Takes faulty answers out of groups, notes or refuses them.

    Args:
        identical: what to do with equal answers of different rank.
        empty: what to do with answers without any text.
        tokenizer: whose ids the answers are.
        writer: where faults are noted.
    """

    def __init__(self, identical: Faulty, empty: Faulty, tokenizer: Tokenizer, writer: ColumnWriter) -> None:
        self.actions: dict[str, Faulty] = {"empty": empty, "identical": identical}
        self.tokenizer, self.writer = tokenizer, writer
        self._blank: dict[int, bool] = {}

    def __call__(self, group: Group, rows: Sequence[Encoded]) -> list[tuple[Answer, Encoded]]:
        """The answers that stay, with their ids; none when the group is left out.

        Raises:
            ValueError: naming the place and the option, when faults are to be errors.
        """
        pairs = list(zip(group.answers, rows, strict=True))
        for fault, find in (("empty", self._empty), ("identical", _contradicting)):
            faulty = find(pairs)
            if not faulty:
                continue
            action = self.actions[fault]
            if action == "error":
                raise ValueError(f"{group.where}: {_complaint(fault, [pairs[i][0] for i in faulty])}")
            kept = pairs if action == "keep" else [pair for i, pair in enumerate(pairs) if i not in faulty]
            if not _useful([answer for answer, _ in kept], group.answers):
                kept = []
            note(self.writer, fault, _outcome(len(pairs), len(kept)), group.where)
            pairs = kept
        return pairs

    def _empty(self, pairs: Sequence[tuple[Answer, Encoded]]) -> list[int]:
        return [i for i, (_, row) in enumerate(pairs) if self._is_empty(row)]

    def _is_empty(self, row: Encoded) -> bool:
        """Whether the answer has no token that shows; usually its first one does."""
        return all(self._is_blank(token) for token, target in zip(*row, strict=True) if target)

    def _is_blank(self, token: int) -> bool:
        if token not in self._blank:
            self._blank[token] = not self.tokenizer.decode([token]).strip()
        return self._blank[token]


def _contradicting(pairs: Sequence[tuple[Answer, Encoded]]) -> list[int]:
    """Answers that occur again with another rank: what people said of them contradicts itself."""
    ranks: dict[tuple[int, ...], set[int]] = {}
    for answer, row in pairs:
        if answer.rank is not None:
            ranks.setdefault(tuple(row.tokens), set()).add(answer.rank)
    return [i for i, (_, row) in enumerate(pairs) if len(ranks.get(tuple(row.tokens), ())) > 1]


def _useful(left: Sequence[Answer], before: Sequence[Answer]) -> bool:
    """Whether what is left still says what people prefer, if all answers did."""
    if len(left) == len(before) or not left:
        return bool(left)
    return left[0].rank is None or len({answer.rank for answer in left}) > 1


def _outcome(before: int, after: int) -> str:
    if after == before:
        return "kept"
    return "lost such answers and kept others" if after else "dropped"


def _complaint(fault: str, answers: Sequence[Answer]) -> str:
    names = " and ".join(repr(answer.name) for answer in answers)
    if fault == "empty":
        what = f"{names} {'is' if len(answers) == 1 else 'are'} empty, nothing but EOS or white space"
    else:
        what = f"{names} are the same answer, so none of them is better"
    return f"{what}; correct the data, or set data.{fault} to drop or keep"
