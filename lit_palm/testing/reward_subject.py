"""What the checks of a reward start from: the author's fixture, completions to score, and what can be set otherwise."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from lit_palm.data.tokenizers import ByteTokenizer
from lit_palm.models.base import ScalarNetwork
from lit_palm.rollout.rewards import Reward, RewardBatch
from lit_palm.testing import entries
from lit_palm.testing.batches import tiny_network

__all__ = ["GROUP", "RewardSubject", "class_and_arguments", "tiny_reward_batch"]

GROUP = "lit_palm.rewards"

COMPLETIONS = (
    "The answer is 4.",
    "4",
    "We add them up.\n#### 4",
    r"So it is \boxed{4}, or 1/2 of 8.",
    "no no no no no no",
    "<think>hm</think> <answer>four</answer>",
    "Yes!",
    "A longer completion that goes on, and on, and then on.",
)
"""What most rewards tell apart."""


def tiny_reward_batch(
    completions: Sequence[str] = COMPLETIONS,
    prompts: Sequence[str] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> RewardBatch:
    """A batch of completions as rewards get it; tokens are bytes, and every completion ends with EOS.

    Args:
        completions: B texts.
        prompts: B texts; None: "What is 2 + 2? ".
        columns: B values by name.
    """
    tokenizer = ByteTokenizer()
    prompts = ["What is 2 + 2? "] * len(completions) if prompts is None else list(prompts)
    prompt_ids = [torch.tensor([*tokenizer.prefix, *tokenizer.encode(text)]) for text in prompts]
    completion_ids = [torch.tensor([*tokenizer.encode(text), tokenizer.eos_id]) for text in completions]
    rows = [torch.cat(pair) for pair in zip(prompt_ids, completion_ids, strict=True)]
    lengths = torch.tensor([len(row) for row in rows])
    return RewardBatch(
        prompts=prompts,
        completions=list(completions),
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        ended=[True] * len(rows),
        tokens=pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_id),
        mask=torch.arange(int(lengths.max())) < lengths[:, None],
        columns={name: list(values) for name, values in (columns or {}).items()},
    )


class RewardSubject:
    """The reward under test and what it is fed; class attributes that a subclass overrides.

    Attributes:
        completions: at least four different texts to score, better ones and worse ones.
        prompts: their prompts, one for each; None: "What is 2 + 2? ".
        columns: columns of the prompt data that it reads, by name: a list with a value for each completion, or one
            value for all of them (which is no list).
        installed: whether the class comes from an installed distribution and must have an entry point; None: found
            out. False for a variant that only tests use.
    """

    completions: ClassVar[Sequence[str]] = COMPLETIONS
    prompts: ClassVar[Sequence[str] | None] = None
    columns: ClassVar[Mapping[str, Any]] = {}
    installed: ClassVar[bool | None] = None

    @pytest.fixture
    def reward(self) -> Callable[..., Reward]:
        """The class under test, or functools.partial of it with arguments."""
        pytest.fail(
            f"{type(self).__name__} has no fixture `reward`: define one that returns your class, or "
            "functools.partial(YourClass, argument=value)"
        )

    def make(self, reward: Callable[..., Reward] | Reward) -> Reward:
        """A fresh reward with the network that it builds; one that is ready is given back."""
        if isinstance(reward, Reward):
            made = reward
        else:
            arguments: dict[str, Any] = {}
            if isinstance(reward, functools.partial):  # the members of an ensemble have to be fresh, too
                arguments = {name: made_of(value) for name, value in reward.keywords.items()}
            made = reward(**arguments)
        assert isinstance(made, Reward), (
            f"the fixture `reward` must return a class, or a functools.partial of one: calling it gave a "
            f"{type(made).__name__}, which is no lit_palm.Reward"
        )
        if made.network is None:
            network = made.build(load_tiny)
            if network is not None:
                made.network = network.requires_grad_(False).eval()
        return made

    def all_rows(self) -> list[int]:
        """Numbers of all completions."""
        return list(range(len(self.completions)))

    def batch(self, rows: Sequence[int], completions: Sequence[str] | None = None) -> RewardBatch:
        """A fresh batch of some rows, with other completions where they are given."""
        texts = [self.completions[i] for i in rows] if completions is None else completions
        prompts = None if self.prompts is None else [self.prompts[i] for i in rows]
        columns = {
            name: [values[i] if isinstance(values, list) else values for i in rows]
            for name, values in self.columns.items()
        }
        return tiny_reward_batch(texts, prompts, columns)


def made_of(value: Any) -> Any:
    """An argument with the rewards in it made: members of an ensemble are given as functools.partial or class."""
    if isinstance(value, list | tuple):
        return [made_of(v) for v in value]
    if isinstance(value, type) and issubclass(value, Reward):
        return value()
    if isinstance(value, functools.partial) and isinstance(value.func, type) and issubclass(value.func, Reward):
        return value.func(*value.args, **{name: made_of(v) for name, v in value.keywords.items()})
    return value


def load_tiny(checkpoint: str, role: str) -> nn.Module:
    """A scalar network, or the language model that the role `policy` asks for, with weights that the checkpoint's name
    alone decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(checkpoint.encode()))
        network = tiny_network(max_length=256)
        return network if role == "policy" else ScalarNetwork(network)


def class_and_arguments(reward: Any) -> tuple[type[Reward], dict[str, Any]]:
    """The class behind the fixture `reward`, with the arguments it is given, by name."""
    return entries.class_and_arguments(reward, Reward, "reward")
