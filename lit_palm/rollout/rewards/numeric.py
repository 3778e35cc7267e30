"""The number in a completion compared with the right one: for arithmetic and word problems."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, Literal

from lit_palm.rollout.rewards.answers import right_answers
from lit_palm.rollout.rewards.base import Reward, RewardBatch, require_finite
from lit_palm.rollout.rewards.reading import Number, boxed, numbers
from lit_palm.rollout.rewards.regex import compiled, picked

__all__ = ["NumericMatch"]


class NumericMatch(Reward):
    """Says whether the number in a completion equals the right answer.

    Without further arguments it is the last number in the completion. Thousands separators, signs, decimals, fractions,
    mixed numbers, percent and their spelling in TeX are understood, and compared exactly: 0.5 is 1/2, 1,000 is 1e3. A
    completion without a number is wrong. A right answer that is a string is read in the same way as a completion where
    that finds something (GSM8K's answers end in "#### 18"), otherwise it is the last number in it.

    Args:
        answer: name of the column with the right answer: a number or a string, or a list of which any one is right.
        extract: a regular expression; looked at is the first group of its last match (without groups: the whole match).
            Empty: none.
        after: a marker, such as "####"; the number is the first one after its last occurrence. Empty: none.
        boxed: the number is in the last \\boxed{...}.
        percent: "50%" equals 50 and 0.5 (either), 50 alone (number) or 0.5 alone (share).
        absolute: differences up to this count as equal.
        relative: differences up to this part of the right answer count as equal.
        match: value of a right completion.
        no_match: value of a wrong one.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged; None: numeric_match.

    Raises:
        ValueError: when a pattern does not compile, a tolerance is negative, or several places are named.
    """

    def __init__(
        self,
        answer: str = "answer",
        extract: str = "",
        after: str = "",
        boxed: bool = False,
        percent: Literal["either", "number", "share"] = "either",
        absolute: float = 0.0,
        relative: float = 0.0,
        match: float = 1.0,
        no_match: float = 0.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        require_finite(self, match=match, no_match=no_match, absolute=absolute, relative=relative)
        if absolute < 0 or relative < 0:
            raise ValueError(f"the tolerances of NumericMatch must not be negative, got {absolute} and {relative}")
        if bool(extract) + bool(after) + boxed > 1:
            raise ValueError("NumericMatch looks in one place: set one of extract, after and boxed")
        self.answer = answer
        # an empty string rather than None for "not set": the YAML reader takes "####" for null where it may be
        self.extract = compiled(self, "extract", extract) if extract else None
        self.after, self.boxed, self.percent = after, boxed, percent
        self.absolute, self.relative = _shortest(absolute), _shortest(relative)
        self.match, self.no_match = match, no_match

    def __call__(self, batch: RewardBatch) -> list[float]:
        """`match` or `no_match`.

        Raises:
            ValueError: when the column is missing, or a row of it holds no number.
        """
        answers = right_answers(batch, self.answer)
        rights = [[self._right(v, row) for v in values] for row, values in enumerate(answers)]
        return [
            self.match if self._equals_any(self._find(text), right) else self.no_match
            for text, right in zip(batch.completions, rights, strict=True)
        ]

    def _find(self, text: str) -> Number | None:
        """The number in the place where the completion is to give it."""
        place: str | None = text
        if self.after:
            _, marker, rest = text.rpartition(self.after)
            found = numbers(rest) if marker else []
            return found[0] if found else None
        if self.extract is not None:
            place = picked(self.extract, text)
        elif self.boxed:
            place = boxed(text)
        found = numbers(place) if place is not None else []
        return found[-1] if found else None

    def _right(self, value: Any, row: int) -> Number:
        if isinstance(value, str):
            found = self._find(value)
            number = found or next(reversed(numbers(value)), None)
        else:
            number = Number(_shortest(value) if math.isfinite(value) else None)
        if number is None or number.value is None:
            raise ValueError(
                f"the column {self.answer!r} of prompt {row} of the batch is {str(value)[:80]!r}, in which there is no "
                "number: correct the data, or use ExactMatch for answers that are words"
            )
        return number

    def _equals_any(self, given: Number | None, right: list[Number]) -> bool:
        if given is None:
            return False
        return any(self._close(x, y) for x in self._readings(given) for number in right for y in self._readings(number))

    def _readings(self, number: Number) -> list[Fraction]:
        """The values that a number may have: several only for a percentage."""
        if number.value is None:
            return []
        if not number.percent or self.percent == "number":
            return [number.value]
        return [number.value / 100] if self.percent == "share" else [number.value, number.value / 100]

    def _close(self, given: Fraction, right: Fraction) -> bool:
        return abs(given - right) <= max(self.absolute, self.relative * abs(right))


def _shortest(value: float) -> Fraction:
    """The number that the shortest decimals of a float mean: 0.1 is 1/10."""
    return Fraction(value) if isinstance(value, int) else Fraction(repr(float(value)))
