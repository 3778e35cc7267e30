"""Stanford Human Preferences (Ethayarajh et al. 2022): which of two answers to a post readers voted higher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from lit_palm.data.readers.base import Drop, Reader, View, distinct, user
from lit_palm.data.readers.places import Hub
from lit_palm.data.sources import Row
from lit_palm.data.templates import Message

__all__ = ["SHP"]


class SHP(Reader):
    """stanfordnlp/SHP (and SHP-2): a post, two comments, and which was voted higher (`labels` 1: A).

    preferences: pairs; all of one post stay on one side of `validation_fraction`. demonstrations: the comment that was
    voted higher. prompts: each post once.

    Args:
        domains: subreddits, such as [askculinary]; None: all.
        min_score_ratio: pairs whose higher score is less than so many times the lower one are left out. The authors
            advise 2 or more where the model is not large: small differences are noise.
        max_pairs: take so many pairs of a post, the first ones; None: all. The authors advise at most 5, since some
            posts have hundreds.
        chat: put the post and comments through the chat template; off: plain texts.

    Raises:
        ValueError: when a number is out of range.
    """

    def __init__(
        self,
        domains: list[str] | None = None,
        min_score_ratio: float = 1.0,
        max_pairs: int | None = None,
        chat: bool = True,
    ) -> None:
        if min_score_ratio < 1 or (max_pairs is not None and max_pairs < 1):
            raise ValueError(
                f"data.reader.min_score_ratio ({min_score_ratio}) and max_pairs ({max_pairs}) must be at least 1"
            )
        self.domains, self.min_score_ratio, self.max_pairs, self.chat = domains, min_score_ratio, max_pairs, chat

    @property
    def hub(self) -> Hub:
        return Hub("stanfordnlp/SHP", data_dir=self.domains[0] if self.domains and len(self.domains) == 1 else None)

    def splits(self, view: View) -> Mapping[str, str]:
        return {"train": "train", "validation": "validation", "test": "test"}

    def preferences(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row, prompt, better, worse in self._pairs(rows, drop):
            columns = {"prompt": prompt, "chosen": self._answer(better), "rejected": self._answer(worse)}
            yield Row(row.where, columns, self.field(row, "post_id", str))

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row, prompt, better, _ in self._pairs(rows, drop):
            columns = {"prompt": prompt, "completion": self._answer(better)}
            yield Row(row.where, columns, self.field(row, "post_id", str))

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        yield from distinct(self._prompts(rows, drop), drop)

    def _prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row, prompt, _, _ in self._pairs(rows, drop):
            columns = {"prompt": prompt, "domain": self.field(row, "domain", str)}
            yield Row(row.where, columns, self.field(row, "post_id", str))

    def _pairs(self, rows: Iterator[Row], drop: Drop) -> Iterator[tuple[Row, str | list[Message], str, str]]:
        taken: Counter[str] = Counter()
        for row in rows:
            post, domain = self.field(row, "post_id", str), self.field(row, "domain", str)
            history = self.field(row, "history", str)
            texts = [self.field(row, f"human_ref_{name}", str) for name in "AB"]
            ratio = self.field(row, "score_ratio", float)
            label = self.field(row, "labels", int)
            if label not in (0, 1):
                raise self.off(row, "labels", int, f"is {label}, neither 1 (A is preferred) nor 0 (B is)")
            # "askculinary_train" in the published files
            if self.domains is not None and not {domain, domain.rpartition("_")[0]} & {*self.domains}:
                drop(row, f"the post is not from {' or '.join(self.domains)} (data.reader.domains)")
            elif ratio < self.min_score_ratio:
                drop(row, f"the score ratio is below {self.min_score_ratio:g} (data.reader.min_score_ratio)")
            elif self.max_pairs is not None and taken[post] >= self.max_pairs:
                drop(row, f"the post has more than {self.max_pairs} pairs (data.reader.max_pairs)")
            else:
                taken[post] += 1
                yield row, user(history) if self.chat else history, *(texts if label == 1 else texts[::-1])

    def _answer(self, text: str) -> str | list[Message]:
        return [{"role": "assistant", "content": text}] if self.chat else text
