"""What a scheduler is asked for, reads and tells: a handle for each request, prompts, a token at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from lit_palm.models.base import Cache
from lit_palm.rollout.sampling import Sampling

__all__ = ["Handle", "QueueFull", "Reading", "Token"]


class QueueFull(RuntimeError):
    """Too many requests wait already."""


class Token(NamedTuple):
    """One sampled token."""

    id: int
    logp: float
    """Its log-probability, as in `Generation.logps`."""
    top: list[tuple[int, float]]
    """The likeliest ids and their log-probabilities, so many as the request asked for."""


@dataclass(eq=False)
class Handle:
    """One request and what has come of it so far."""

    prompt: list[int]
    sampling: Sampling
    seed: int
    num_top: int = 0
    on_token: Callable[[Handle, Token], None] | None = None
    on_end: Callable[[Handle], None] | None = None
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    """None while it waits or runs; then "eos", "stop", "length", "cancelled" or "error"."""
    error: str | None = None
    """Why it ended, when that was an error."""

    @property
    def width(self) -> int:
        """Most slots of the cache that it can come to need."""
        return len(self.prompt) + self.sampling.max_new_tokens

    @property
    def cached(self) -> int:
        """Tokens of it in the cache: all but the last, which is fed next."""
        return len(self.prompt) + len(self.tokens) - 1

    def end(self, reason: str, error: str | None = None) -> None:
        """Settle how it ended and tell who asked."""
        self.finish_reason, self.error = reason, error
        if self.on_end is not None:
            self.on_end(self)


@dataclass
class Reading:
    """Prompts on their way into a cache of their own."""

    cache: Cache
    tokens: Tensor
    """[D, T], the distinct prompts, left-padded."""
    mask: Tensor | None
    positions: Tensor | None
    which: list[int]
    """The prompt of each row that joins."""
    place: int = 0
    """Tokens read so far."""
