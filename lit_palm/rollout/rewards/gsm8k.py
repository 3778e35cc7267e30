"""The answer check of GSM8K (Cobbe et al. 2021, https://github.com/openai/grade-school-math)."""

from __future__ import annotations

import re
from typing import Any, Literal

from lit_palm.rollout.rewards.answers import right_answers
from lit_palm.rollout.rewards.base import Reward, RewardBatch, require_finite
from lit_palm.rollout.rewards.reading import Number, boxed, numbers

__all__ = ["GSM8KAnswer", "published_answer"]

_PUBLISHED = re.compile(r"#### (\-?[0-9\.\,]+)")


def published_answer(text: str) -> str | None:
    """The final answer as the dataset's own code extracts it: behind the first "#### ", without commas."""
    match = _PUBLISHED.search(text)
    return match[1].replace(",", "") if match else None


class GSM8KAnswer(Reward):
    """Says whether a completion ends in the right number.

    With `check: tolerant` the number of a completion is the first one behind its last "####"; without that, the last
    one in its last \\boxed{...}; without that, the last one of all. Numbers are compared by value: thousands
    separators, $, % and trailing zeros make no difference. With `check: published` it is what the dataset's own code
    extracts (behind "#### ", commas taken out), compared as text: figures are then those of the paper's check.

    Args:
        answer: name of the column with the right answer: a number, or a solution that ends in "#### 42".
        check: tolerant or published.
        match: value of a right completion.
        no_match: value of a wrong one.
        format_match: added where the completion gives its answer behind "#### ", right or wrong.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged; None: gsm8k_answer.
    """

    def __init__(
        self,
        answer: str = "answer",
        check: Literal["tolerant", "published"] = "tolerant",
        match: float = 1.0,
        no_match: float = 0.0,
        format_match: float = 0.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name or "gsm8k_answer")
        require_finite(self, match=match, no_match=no_match, format_match=format_match)
        self.answer, self.check = answer, check
        self.match, self.no_match, self.format_match = match, no_match, format_match

    def __call__(self, batch: RewardBatch) -> list[float]:
        """`match` or `no_match`, and `format_match`.

        Raises:
            ValueError: when the column is missing, or a row of it holds no number.
        """
        right = right_answers(batch, self.answer)
        values = []
        for row, (text, answers) in enumerate(zip(batch.completions, right, strict=True)):
            equal = [self._equal(text, answer, row) for answer in answers]
            formatted = self.format_match if published_answer(text) is not None else 0.0
            values.append((self.match if any(equal) else self.no_match) + formatted)
        return values

    def _equal(self, text: str, answer: Any, row: int) -> bool:
        if self.check == "published":
            wanted = published_answer(answer if "####" in str(answer) else f"#### {answer}")
            if wanted is None:
                raise self._no_number(answer, row)
            return published_answer(text) == wanted
        number = _final(str(answer))
        if number is None or number.value is None:
            raise self._no_number(answer, row)
        given = _final(text)
        return given is not None and given.value == number.value

    def _no_number(self, answer: Any, row: int) -> ValueError:
        return ValueError(
            f"the column {self.answer!r} of prompt {row} of the batch is {str(answer)[-80:]!r}, in which there is no "
            "number: set `answer` to the column with the right ones"
        )


def _final(text: str) -> Number | None:
    """The number that a text gives as its answer."""
    _, marker, rest = text.rpartition("####")
    if marker and (found := numbers(rest)):
        return found[0]
    inside = boxed(text)
    found = (numbers(inside) if inside is not None else []) or numbers(text)
    return found[-1] if found else None
