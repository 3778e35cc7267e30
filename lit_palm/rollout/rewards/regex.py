"""A regular expression as a reward: for formats, and for words that shall or shall not be said."""

from __future__ import annotations

import re
from typing import Literal

from lit_palm.rollout.rewards.base import Reward, RewardBatch, require_finite

__all__ = ["RegexReward", "compiled", "picked"]


class RegexReward(Reward):
    """Says whether a regular expression is found in a completion, or how often.

    Flags go into the pattern: `(?i)` ignores case, `(?s)` lets a dot match line breaks, `(?m)` lets ^ and $ match at
    each line.

    Args:
        pattern: a regular expression in Python's syntax, such as `(?s)<think>.*</think>.*`.
        match: value of a match.
        no_match: value of a completion without one.
        full: the whole text must match, rather than any part of it.
        max_count: so many matches count at most, each of them for `match`.
        over: search the completion alone, or the prompt and the completion in one.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged; None: regex_reward.

    Raises:
        ValueError: when the pattern does not compile, or arguments do not fit together.
    """

    def __init__(
        self,
        pattern: str,
        match: float = 1.0,
        no_match: float = 0.0,
        full: bool = False,
        max_count: int = 1,
        over: Literal["completion", "text"] = "completion",
        weight: float = 1.0,
        name: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        require_finite(self, match=match, no_match=no_match)
        self.pattern = compiled(self, "pattern", pattern)
        if max_count < 1:
            raise ValueError(f"max_count of RegexReward is {max_count}; it must be at least 1")
        if max_count > 1 and full:
            raise ValueError("max_count of RegexReward cannot exceed 1 with full=true: the whole text matches once")
        if max_count > 1 and self.pattern.search(""):
            raise ValueError(
                f"pattern of RegexReward {pattern!r} matches the empty text, so that its matches cannot be counted: "
                "let it ask for at least one character, or leave max_count at 1"
            )
        self.match, self.no_match = match, no_match
        self.full, self.max_count, self.over = full, max_count, over

    def __call__(self, batch: RewardBatch) -> list[float]:
        """`match` times the matches that count, or `no_match`."""
        texts = batch.completions
        if self.over == "text":
            texts = [prompt + text for prompt, text in zip(batch.prompts, texts, strict=True)]
        counts = map(self._count, texts)
        return [self.match * count if count else self.no_match for count in counts]

    def _count(self, text: str) -> int:
        if self.full:
            return int(self.pattern.fullmatch(text) is not None)
        # stops looking once enough are found
        return sum(1 for _ in zip(range(self.max_count), self.pattern.finditer(text), strict=False))


def compiled(reward: Reward, argument: str, pattern: str) -> re.Pattern[str]:
    """A compiled pattern.

    Raises:
        ValueError: naming class, argument and place, when it does not compile.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        where = "" if error.pos is None else f" at character {error.pos}"
        raise ValueError(
            f"{argument} of {type(reward).__name__} {pattern!r} is no regular expression: {error.msg}{where}. Write "
            "\\( for a bracket that means itself; in YAML put the pattern into single quotes, where backslashes stay"
        ) from error


def picked(pattern: re.Pattern[str], text: str) -> str | None:
    """What a pattern picks out of a text: the first group (without groups: the whole) of its last match, or None."""
    last = None
    for last in pattern.finditer(text):  # noqa: B007
        pass
    if last is None:
        return None
    groups = [group for group in last.groups() if group is not None]
    return groups[0] if groups else last.group()
