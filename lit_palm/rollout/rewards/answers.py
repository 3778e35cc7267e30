"""Completions compared with the right answers in a column of the prompt data."""

from __future__ import annotations

from typing import Any

from lit_palm.rollout.rewards.base import Reward, RewardBatch, require_finite
from lit_palm.rollout.rewards.regex import compiled, picked

__all__ = ["ExactMatch", "right_answers"]


class ExactMatch(Reward):
    """Says whether a completion, or what a pattern picks out of it, is the right answer.

    Args:
        answer: name of the column with the right answer: a string or a number, or a list of which any one is right.
        extract: a regular expression; compared is the first group of its last match in the completion (without groups:
            the whole match). A completion in which it is not found is wrong. Empty: the whole completion.
        extract_answer: the same for the column, where it holds a whole solution; it must be found there.
        strip: leave white space at either end aside.
        ignore_case: compare without case.
        match: value of a right completion.
        no_match: value of a wrong one.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged; None: exact_match.

    Raises:
        ValueError: when a pattern does not compile.
    """

    def __init__(
        self,
        answer: str = "answer",
        extract: str = "",
        extract_answer: str = "",
        strip: bool = True,
        ignore_case: bool = False,
        match: float = 1.0,
        no_match: float = 0.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        require_finite(self, match=match, no_match=no_match)
        self.answer = answer
        # an empty string rather than None for "not set": the YAML reader takes "#### (.*)" for null where it may be
        self.extract = compiled(self, "extract", extract) if extract else None
        self.extract_answer = compiled(self, "extract_answer", extract_answer) if extract_answer else None
        self.strip, self.ignore_case = strip, ignore_case
        self.match, self.no_match = match, no_match

    def __call__(self, batch: RewardBatch) -> list[float]:
        """`match` or `no_match`.

        Raises:
            ValueError: when the column is missing, or a row of it holds no answer.
        """
        values = []
        for row, (text, right) in enumerate(zip(batch.completions, right_answers(batch, self.answer), strict=True)):
            given = text if self.extract is None else picked(self.extract, text)
            wanted = {self._normal(self._expected(value, row)) for value in right}
            hit = given is not None and self._normal(given) in wanted
            values.append(self.match if hit else self.no_match)
        return values

    def _expected(self, value: Any, row: int) -> str:
        text = str(value)
        if self.extract_answer is None:
            return text
        found = picked(self.extract_answer, text)
        if found is None:
            raise ValueError(
                f"extract_answer {self.extract_answer.pattern!r} is not found in the column {self.answer!r} of prompt "
                f"{row} of the batch: {text[:80]!r}"
            )
        return found

    def _normal(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


def right_answers(batch: RewardBatch, column: str) -> list[list[Any]]:
    """The right answers to each of the B prompts, strings or numbers.

    Raises:
        ValueError: naming the column, when the data has none of this name or a row of it holds no answer.
    """
    if column not in batch.columns:
        has = ", ".join(map(repr, batch.columns)) or "none"
        raise ValueError(
            f"the prompt data has no column {column!r} to compare with (its columns beside the prompt: {has}): set "
            "`answer` to the one that holds the right answers"
        )
    found = []
    for row, value in enumerate(batch.columns[column]):
        answers = list(value) if isinstance(value, (list, tuple)) else [value]
        if not answers or any(isinstance(v, bool) or not isinstance(v, (str, int, float)) for v in answers):
            raise ValueError(
                f"the column {column!r} of prompt {row} of the batch is {value!r:.80}; it must hold a string, a "
                "number, or a list of them that are right"
            )
        found.append(answers)
    return found
