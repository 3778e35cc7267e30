"""Penalties, zero at best: for completions that are too short, too long or repeat themselves."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

from lit_palm.rollout.rewards.base import Reward, RewardBatch, require_finite

__all__ = ["LengthPenalty", "RepetitionPenalty"]


class LengthPenalty(Reward):
    """Subtracts for every unit by which a completion is shorter than a minimum or longer than a maximum.

    The value is -min(penalty * distance, cap), where the distance to the range from `min_length` to `max_length` is
    counted in units.

    Args:
        max_length: longest completion without a penalty; None: any.
        min_length: shortest completion without a penalty.
        unit: count tokens as sampled (EOS is one of them) or characters of the text.
        penalty: for one unit beyond the range.
        cap: the largest penalty; None: without bound.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged; None: length_penalty.

    Raises:
        ValueError: when the range is empty or there is none, or a penalty is negative.
    """

    def __init__(
        self,
        max_length: int | None = None,
        min_length: int = 0,
        unit: Literal["token", "character"] = "token",
        penalty: float = 0.01,
        cap: float | None = 1.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        require_finite(self, penalty=penalty, cap=cap or 0.0)
        if min_length < 0 or (max_length is not None and max_length < min_length):
            raise ValueError(
                f"LengthPenalty leaves no length without a penalty: min_length {min_length}, max_length {max_length}"
            )
        if max_length is None and min_length == 0:
            raise ValueError("LengthPenalty has nothing to compare with: set max_length, min_length or both")
        if penalty < 0 or (cap is not None and cap < 0):
            raise ValueError(
                f"penalty {penalty} and cap {cap} of LengthPenalty are subtracted, so they must not be negative; a "
                "negative weight rewards what lies outside the range"
            )
        self.max_length, self.min_length, self.unit = max_length, min_length, unit
        self.penalty, self.cap = penalty, cap

    def __call__(self, batch: RewardBatch) -> list[float]:
        """Zero within the range, negative outside."""
        items: Sequence[Sequence[object] | object] = batch.completion_ids if self.unit == "token" else batch.completions
        return [self._value(len(item)) for item in items]  # type: ignore[arg-type]

    def _value(self, length: int) -> float:
        above = length - self.max_length if self.max_length is not None else 0
        penalty = self.penalty * max(self.min_length - length, above, 0)
        return 0.0 - (penalty if self.cap is None else min(penalty, self.cap))


class RepetitionPenalty(Reward):
    """Subtracts for the share of n-grams that a completion has said before.

    The value is -penalty * max(0, share - allowed), with share = 1 - (different n-grams) / (n-grams), which is one
    minus distinct-n. A completion of fewer than n + 1 units repeats nothing.

    Args:
        n: units in an n-gram; of 1, common words are counted as repetitions too.
        unit: tokens as sampled, or words: what white space separates, without case.
        penalty: for a completion that says one thing over and over.
        allowed: share of repetitions that costs nothing.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged; None: repetition_penalty.

    Raises:
        ValueError: when an argument is out of range.
    """

    def __init__(
        self,
        n: int = 3,
        unit: Literal["token", "word"] = "token",
        penalty: float = 1.0,
        allowed: float = 0.0,
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        require_finite(self, penalty=penalty, allowed=allowed)
        if n < 1:
            raise ValueError(f"n of RepetitionPenalty is {n}; it must be at least 1")
        if penalty < 0:
            raise ValueError(f"penalty of RepetitionPenalty is {penalty}; it is subtracted, so it must not be negative")
        if not 0 <= allowed < 1:
            raise ValueError(f"allowed of RepetitionPenalty is {allowed}; it is a share, at least 0 and below 1")
        self.n, self.unit, self.penalty, self.allowed = n, unit, penalty, allowed

    def __call__(self, batch: RewardBatch) -> list[float]:
        """Zero without repetitions, at worst almost -penalty."""
        units: list[list[Hashable]]
        if self.unit == "token":
            units = [ids.tolist() for ids in batch.completion_ids]
        else:
            units = [list(text.casefold().split()) for text in batch.completions]
        return [0.0 - self.penalty * max(0.0, self._share(sequence) - self.allowed) for sequence in units]

    def _share(self, units: Sequence[Hashable]) -> float:
        """Share of the n-grams that occurred before, in [0, 1)."""
        grams = [tuple(units[i : i + self.n]) for i in range(len(units) - self.n + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0
