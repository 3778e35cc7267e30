"""Several rewards added up, and every value checked on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_palm.rollout.rewards.base import Reward, RewardBatch

__all__ = ["Totals", "reward_totals", "scored", "total_reward"]


class Totals(NamedTuple):
    """What several rewards come to; float32, on the device of `batch.tokens`."""

    scores: Tensor
    """[B], the weighted sum."""
    values: dict[str, Tensor]
    """Name -> [B] before weighting, in the order of `Reward.logged` (so a member of an ensemble is NAME/MEMBER, and
    adds nothing to the sum by itself)."""
    tokens: Tensor | None
    """[B, T], the weighted sum of what rewards said of single tokens, zero outside the completions; it is a part of the
    scores. None: none of them did."""


def total_reward(rewards: Sequence[Reward], batch: RewardBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """`scores` and `values` of `reward_totals`."""
    return reward_totals(rewards, batch)[:2]


def reward_totals(rewards: Sequence[Reward], batch: RewardBatch) -> Totals:
    """Weighted sum of several rewards, every one of them checked.

    Args:
        rewards: what to add up; each name once.
        batch: B completions.

    Raises:
        ValueError: naming the reward, when it raises, or returns NaN, infinity, another length than B or anything but
            numbers; when there is no reward; when two have one name.
    """
    if not rewards:
        raise ValueError("there is no reward to optimise: name at least one under `rewards`")
    total = torch.zeros(len(batch), dtype=torch.float32, device=batch.tokens.device)
    values: dict[str, Tensor] = {}
    tokens: Tensor | None = None
    for reward in rewards:
        found, own_tokens = _evaluated(reward, batch)
        for name in found:
            if name in values:
                raise ValueError(f"two rewards are called {name!r}: give one of them another `name`")
        values |= found
        total += reward.weight * found[reward.name]
        if own_tokens is not None:
            tokens = reward.weight * own_tokens + (0 if tokens is None else tokens)
    return Totals(total, values, tokens)


def scored(reward: Reward, batch: RewardBatch) -> dict[str, Tensor]:
    """Values [B] of one reward under its name, then those of its members as NAME/MEMBER, before any weighting.

    Raises:
        ValueError: naming the reward, when it raises, or returns anything but B finite numbers, or [B, T].
    """
    return _evaluated(reward, batch)[0]


def _evaluated(reward: Reward, batch: RewardBatch) -> tuple[dict[str, Tensor], Tensor | None]:
    """What `scored` gives, and what the reward itself said of single tokens [B, T]."""
    try:
        raw, members = reward.score(batch)
    except Exception as error:  # a user's function may raise anything
        raise ValueError(f"reward {reward.name!r} raised {type(error).__name__}: {error}") from error
    named = {reward.name: raw} | {f"{reward.name}/{name}": values for name, values in members.items()}
    named = {name: _laid_out(name, values, batch) for name, values in named.items()}
    dense = {name: values for name, values in named.items() if isinstance(values, Tensor) and values.dim() == 2}
    tokens = {name: _of_tokens(name, values, batch) for name, values in dense.items()}
    sums = {name: values.sum(1) for name, values in tokens.items()}
    scores = {name: _as_scores(name, sums.get(name, values), batch) for name, values in named.items()}
    return scores, tokens.get(reward.name)


def _laid_out(name: str, raw: Any, batch: RewardBatch) -> Any:
    """Sequences of one number a token, one sequence a completion, as [B, T]; anything else as it is."""
    rows = list(raw) if isinstance(raw, (list, tuple)) else []
    if len(rows) != len(batch) or not all(isinstance(r, (list, tuple)) or getattr(r, "ndim", 0) == 1 for r in rows):
        return raw
    laid = torch.zeros(batch.tokens.shape, dtype=torch.float32, device=batch.tokens.device)
    for place, (row, prompt, ids) in enumerate(zip(rows, batch.prompt_ids, batch.completion_ids, strict=True)):
        if len(row) != len(ids):
            raise ValueError(
                f"reward {name!r} returned {len(row)} numbers for completion {place}, which has {len(ids)} tokens: "
                "return one number a completion, or one for each of its tokens"
            )
        laid[place, len(prompt) : len(prompt) + len(ids)] = torch.as_tensor(row, dtype=torch.float32).to(laid.device)
    return laid


def _of_tokens(name: str, raw: Tensor, batch: RewardBatch) -> Tensor:
    """What a reward said of tokens as float32 [B, T], zero outside the completions, or the reason why not."""
    if raw.shape != batch.tokens.shape:
        raise ValueError(
            f"reward {name!r} returned a tensor of shape {list(raw.shape)}; values of tokens must have the shape of "
            f"batch.tokens, {list(batch.tokens.shape)}"
        )
    values = raw.detach().to(batch.tokens.device, torch.float32)
    values = torch.where(batch.completion_mask, values, 0)
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad):
        row, place = bad[0].tolist()
        raise ValueError(
            f"reward {name!r} returned {values[row, place].item()} for token {place - len(batch.prompt_ids[row])} of "
            f"completion {row}: {batch.completions[row][:80]!r}"
        )
    return values


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
