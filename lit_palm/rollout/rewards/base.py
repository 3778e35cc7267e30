"""What a reward is: the abstract class, and the batch of completions that it gets."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["NetworkLoader", "Reward", "RewardBatch", "Values", "every_reward", "require_finite"]

NetworkLoader = Callable[[str, str], nn.Module]
"""load(checkpoint, role) -> network: `lit_palm.modules.weights.load_network`, or a test's own."""

Values = Sequence[float] | Sequence[Sequence[float]] | Tensor
"""One number for each of the B completions, a sequence of length B or a tensor [B]; or one for each of their tokens, a
tensor [B, T] as `RewardBatch.tokens`, or B sequences as long as `RewardBatch.completion_ids`. The sum over a completion
is then its score."""


@dataclass
class RewardBatch:
    """Completions to be scored; lists and tensors have one element (row) for each of the B completions.

    Args:
        prompts: text of the prompts.
        completions: text of the completions, without EOS and stop sequences.
        prompt_ids: [n] long, token ids of each prompt.
        completion_ids: [n] long, token ids of each completion as sampled (with EOS), never decoded and re-tokenised.
        ended: the completion ended by itself, with EOS or a stop sequence.
        tokens: [B, T] long, prompt and completion, right-padded.
        mask: [B, T] bool, True where a token is real.
        columns: every other column of the prompt data by name.
    """

    prompts: list[str]
    completions: list[str]
    prompt_ids: list[Tensor]
    completion_ids: list[Tensor]
    ended: list[bool]
    tokens: Tensor
    mask: Tensor
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    @property
    def completion_mask(self) -> Tensor:
        """[B, T] bool, True where a token belongs to the completion."""
        start = torch.tensor([len(ids) for ids in self.prompt_ids], device=self.tokens.device)
        place = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return self.mask & (place >= start[:, None])


class Reward(ABC):
    """Base class of every reward; subclass it, implement `__call__` and register an entry point.

    Args:
        weight: what its values are multiplied by in the sum.
        name: under which it is logged, as rewards/NAME/mean; None: the class name in snake case.
    """

    API_VERSION: ClassVar[int] = 1
    """The plugin interface this class was written for; a plugin states a literal of its own."""

    weight: float = 1.0
    network: nn.Module | None = None
    """What `build` returned, on the device it computes on; set by the host."""

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        require_finite(self, weight=weight)
        self.weight = weight
        self._name = name

    @property
    def name(self) -> str:
        """The name it is logged and reported under."""
        return getattr(self, "_name", None) or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()

    def build(self, load: NetworkLoader) -> nn.Module | None:
        """Make the network that the reward needs; None when it needs none.

        Args:
            load: called as load(checkpoint, role).
        """
        return None

    @abstractmethod
    def __call__(self, batch: RewardBatch) -> Values:
        """One finite number for each of the B completions: a sequence of length B or a tensor [B].

        Or one for each token (see `Values`), of a reward that knows what each was worth: what stands outside
        the completion counts for nothing, and the sum over it is the completion's score. An objective that gives
        credit to tokens (PPO) reads them all, others read the score.
        """

    # ---- for rewards that are made of others

    @property
    def members(self) -> Sequence[Reward]:
        """The rewards that this one is made of; their values are logged as rewards/NAME/MEMBER/mean."""
        return ()

    @property
    def logged(self) -> list[str]:
        """The names of everything that `total_reward` gives for it: its own, then its members' as NAME/MEMBER."""
        return [self.name, *(f"{self.name}/{name}" for member in self.members for name in member.logged)]

    def score(self, batch: RewardBatch) -> tuple[Values, Mapping[str, Values]]:
        """What `total_reward` calls: the values, and those of the members by the names they have in `logged`, without
        the reward's own in front. A reward without members need not know of it."""
        return self(batch), {}


def every_reward(rewards: Sequence[Reward]) -> Iterator[Reward]:
    """The rewards and everything they are made of, each before its members."""
    for reward in rewards:
        yield reward
        yield from every_reward(reward.members)


def require_finite(reward: Reward, **values: float) -> None:
    """Refuse an argument that would make a reward infinite or NaN.

    Raises:
        ValueError: naming the class and the argument.
    """
    for name, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} of {type(reward).__name__} is {value}; it must be a finite number")
