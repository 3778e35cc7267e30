"""Several rewards added up, and every value checked on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_palm.rollout.rewards.base import Reward, RewardBatch

__all__ = ["scored", "total_reward"]


def total_reward(rewards: Sequence[Reward], batch: RewardBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum of several rewards, every one of them checked.

    Args:
        rewards: what to add up; each name once.
        batch: B completions.

    Returns:
        The sum [B], and name -> [B] before weighting, in the order of `Reward.logged` (so a member of an ensemble is
        NAME/MEMBER, and adds nothing to the sum by itself); float32, on the device of `batch.tokens`.

    Raises:
        ValueError: naming the reward, when it raises, or returns NaN, infinity, another length than B or anything but
            numbers; when there is no reward; when two have one name.
    """
    if not rewards:
        raise ValueError("there is no reward to optimise: name at least one under `rewards`")
    total = torch.zeros(len(batch), dtype=torch.float32, device=batch.tokens.device)
    values: dict[str, Tensor] = {}
    for reward in rewards:
        found = scored(reward, batch)
        for name in found:
            if name in values:
                raise ValueError(f"two rewards are called {name!r}: give one of them another `name`")
        values |= found
        total += reward.weight * found[reward.name]
    return total, values


def scored(reward: Reward, batch: RewardBatch) -> dict[str, Tensor]:
    """Values [B] of one reward under its name, then those of its members as NAME/MEMBER, before any weighting.

    Raises:
        ValueError: naming the reward, when it raises, or returns anything but B finite numbers.
    """
    try:
        raw, members = reward.score(batch)
    except Exception as error:  # a user's function may raise anything
        raise ValueError(f"reward {reward.name!r} raised {type(error).__name__}: {error}") from error
    named = {reward.name: raw} | {f"{reward.name}/{name}": values for name, values in members.items()}
    return {name: _as_scores(name, values, batch) for name, values in named.items()}


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
