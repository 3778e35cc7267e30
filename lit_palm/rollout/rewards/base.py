"""Rewards: what a completion is worth. A reward model, a Python function, or a weighted sum of several.

A reward gets the whole batch, as text and as token ids, together with every other column of the prompt data (such as
`answer`), and returns one number for each completion:

    def exact(completions: list[str], answer: list[str], **columns) -> list[float]:
        return [float(text.strip() == right) for text, right in zip(completions, answer)]

    rewards = [PythonReward("my_rewards.exact"), RewardModel("reward.ckpt", weight=0.5)]
    scores_B, values = total_reward(rewards, batch)

Rewards know no devices and no checkpoints: the host passes `build` a loader, keeps the network where it computes and
sets `reward.network`. Entry-point group `lit_palm.rewards`.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["NetworkLoader", "PythonReward", "Reward", "RewardBatch", "RewardModel", "total_reward"]

NetworkLoader = Callable[[str, str], nn.Module]
"""load(checkpoint, role) -> network: `lit_palm.modules.checkpoint.load_network`, or a test's own."""


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
        if not math.isfinite(weight):
            raise ValueError(f"weight of {type(self).__name__} is {weight}; it must be a finite number")
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
    def __call__(self, batch: RewardBatch) -> Sequence[float] | Tensor:
        """One finite number for each of the B completions: a sequence of length B or a tensor [B]."""


class RewardModel(Reward):
    """Scores completions with a learned reward model: its calibrated scalar at the last real token.

    Args:
        checkpoint: checkpoint of `LitRewardModel`.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged.
        batch_size: rows in one forward pass; rows are sorted by length, so that little is computed on padding.
    """

    def __init__(self, checkpoint: str, weight: float = 1.0, name: str = "reward_model", batch_size: int = 64) -> None:
        super().__init__(weight, name)
        if batch_size < 1:
            raise ValueError(f"batch_size of reward {name!r} is {batch_size}; it must be at least 1")
        self.checkpoint = checkpoint
        self.batch_size = batch_size

    def build(self, load: NetworkLoader) -> nn.Module:
        return load(self.checkpoint, "reward")

    @torch.no_grad()
    def __call__(self, batch: RewardBatch) -> Tensor:
        """Scores [B] in float32, on the device of `batch.tokens`.

        The number of forward passes is ceil(B / batch_size) whatever the lengths, so ranks with as many rows stay in
        step under sharding. Dropout is off.

        Raises:
            ValueError: when a row is empty or longer than the network's context.
        """
        network = self.network
        assert network is not None, "the host sets reward.network to what build() returned"
        lengths = batch.mask.sum(1)
        self._check_lengths(network, lengths)
        device = next(network.parameters()).device
        training = network.training
        network.eval()
        try:
            scores = torch.zeros(len(lengths), dtype=torch.float32, device=device)
            for rows in torch.argsort(lengths, descending=True, stable=True).split(self.batch_size):
                last = lengths[rows] - 1
                tokens = batch.tokens[rows, : int(last.max()) + 1].to(device)
                # Right padding needs no mask: a causal network cannot see it from the last real token.
                values = network(tokens)
                picked = values.gather(1, last.to(device)[:, None]).squeeze(1)
                scores[rows.to(device)] = picked.float()
        finally:
            network.train(training)
        return scores.to(batch.tokens.device)

    def _check_lengths(self, network: nn.Module, lengths: Tensor) -> None:
        if len(lengths) and int(lengths.min()) < 1:
            raise ValueError(f"row {int(lengths.argmin())} has no tokens, neither prompt nor completion")
        config = getattr(getattr(network, "trunk", network), "config", None)
        longest = getattr(config, "max_length", None)
        if longest is not None and len(lengths) and int(lengths.max()) > longest:
            raise ValueError(
                f"row {int(lengths.argmax())} has {int(lengths.max())} tokens and the reward model {self.checkpoint} "
                f"reads at most {longest}: lower max_new_tokens or max_prompt_length"
            )


class PythonReward(Reward):
    """Scores completions with a Python function: fn(prompts=, completions=, prompt_ids=, completion_ids=, **columns).

    A function that takes only some of these, and has no `**kwargs`, gets those it names. It returns a list of B
    numbers; a module next to where the command is run is found too.

    Args:
        function: "package.module.function", or the function itself.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged; None: the function's name.
    """

    def __init__(
        self, function: str | Callable[..., Sequence[float] | Tensor], weight: float = 1.0, name: str | None = None
    ) -> None:
        self.function = _import_function(function) if isinstance(function, str) else function
        if not callable(self.function):
            raise ValueError(f"reward function {function!r} is a {type(self.function).__name__}, which is not callable")
        super().__init__(weight, name or getattr(self.function, "__name__", type(self.function).__name__))
        self._accepts = _parameters(self.function)

    def __call__(self, batch: RewardBatch) -> Sequence[float] | Tensor:
        given: dict[str, Any] = {
            "prompts": batch.prompts,
            "completions": batch.completions,
            "prompt_ids": batch.prompt_ids,
            "completion_ids": batch.completion_ids,
        }
        clash = sorted(given.keys() & batch.columns.keys())
        if clash:
            raise ValueError(f"the data has a column {clash[0]!r}, which is what the reward itself passes: rename it")
        given |= batch.columns
        if self._accepts is not None:
            missing = [name for name, needed in self._accepts.items() if needed and name not in given]
            if missing:
                raise ValueError(f"its function needs {', '.join(missing)}; the data offers {', '.join(given)}")
            given = {name: value for name, value in given.items() if name in self._accepts}
        return self.function(**given)


def _import_function(path: str) -> Any:
    """The object `name` of the module `package.module`, given "package.module.name".

    Raises:
        ValueError: when it cannot be imported, naming the path and the cause.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look where it is run
    module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name:
        raise ValueError(f'reward function {path!r}: write it as "package.module.function"')
    try:
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:  # whatever the module raises, the user must learn which reward it was
        raise ValueError(
            f"reward function {path!r} cannot be imported ({type(error).__name__}: {error}): check the path, and that "
            "its folder is the current one or on PYTHONPATH"
        ) from error


def _parameters(function: Callable[..., Any]) -> dict[str, bool] | None:
    """Keyword parameter -> is it required; None when the function takes any keyword or cannot be inspected."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p.default is inspect.Parameter.empty for p in parameters if p.kind in named}


def total_reward(rewards: Sequence[Reward], batch: RewardBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of several rewards, every one of them checked.

    Args:
        rewards: what to add up; each name once.
        batch: B completions.

    Returns:
        The sum [B], and name -> [B] before weighting; float32, on the device of `batch.tokens`.

    Raises:
        ValueError: naming the reward, when it raises, or returns NaN, infinity, another length than B or anything but
            numbers; when there is no reward; when two have one name.
    """
    if not rewards:
        raise ValueError("there is no reward to optimise: name at least one under `rewards`")
    total = torch.zeros(len(batch), dtype=torch.float32, device=batch.tokens.device)
    values: dict[str, Tensor] = {}
    for reward in rewards:
        if reward.name in values:
            raise ValueError(f"two rewards are called {reward.name!r}: give one of them another `name`")
        try:
            raw = reward(batch)
        except Exception as error:  # a user's function may raise anything
            raise ValueError(f"reward {reward.name!r} raised {type(error).__name__}: {error}") from error
        values[reward.name] = _as_scores(reward.name, raw, batch)
        total += reward.weight * values[reward.name]
    return total, values


def _as_scores(name: str, raw: Any, batch: RewardBatch) -> Tensor:
    """What a reward returned as float32 [B], or the reason why not."""
    wanted = f"it must return {len(batch)} numbers, one for each completion"
    if isinstance(raw, (str, bytes, Mapping)) or not hasattr(raw, "__len__"):
        raise ValueError(f"reward {name!r} returned a {type(raw).__name__}; {wanted}")
    if not isinstance(raw, Tensor):
        for row, value in enumerate(raw):
            if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
                raise ValueError(f"reward {name!r} returned {value!r} for completion {row}; {wanted}")
        raw = [float(value) for value in raw]
    scores = torch.as_tensor(raw, dtype=torch.float32).detach().to(batch.tokens.device)
    if scores.shape != (len(batch),):
        got = f"{len(scores)} values" if scores.dim() == 1 else f"a tensor of shape {list(scores.shape)}"
        raise ValueError(f"reward {name!r} returned {got}; {wanted}")
    bad = (~torch.isfinite(scores)).nonzero()
    if len(bad):
        row = int(bad[0])
        text = batch.completions[row]
        raise ValueError(f"reward {name!r} returned {scores[row].item()} for completion {row}: {text[:80]!r}")
    return scores
