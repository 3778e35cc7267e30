"""Which of a round's completions are kept: pure functions of scores and groups, whatever the order of the rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_palm import Experience

__all__ = ["at_least_percentile", "best_of_group", "first_of_equals"]


def best_of_group(scores: Tensor, group: Tensor, row: Tensor, count: int, allowed: Tensor) -> Tensor:
    """The `count` highest scores of each group; of equal ones the lowest row number first.

    Args:
        scores: [B].
        group: [B] long.
        row: [B] long, the number that decides between equal scores.
        count: how many of each group.
        allowed: [B] bool, others are not considered.

    Returns:
        [B] bool.
    """
    order = row.argsort(stable=True)
    order = order[scores[order].argsort(descending=True, stable=True)]
    order = order[(~allowed[order]).long().argsort(stable=True)]
    order = order[group[order].argsort(stable=True)]
    _, sizes = group.unique(return_counts=True)
    place = torch.arange(len(group)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    kept = torch.zeros(len(group), dtype=torch.bool)
    kept[order] = place < count
    return kept & allowed


def at_least_percentile(scores: Tensor, percentile: float, allowed: Tensor) -> Tensor:
    """[B] bool: the allowed scores at or above their percentile (0 keeps all, 100 the maximum alone)."""
    if not bool(allowed.any()):
        return allowed
    return allowed & (scores >= torch.quantile(scores[allowed].double(), percentile / 100).to(scores.dtype))


def first_of_equals(experience: Experience) -> Tensor:
    """[B] bool: False for a completion that equals another of its prompt with a lower row number."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    first = torch.zeros(experience.num_rows, dtype=torch.bool)
    group = experience["group"].tolist()
    for i in experience["row"].argsort(stable=True).tolist():
        key = group[i], tuple(experience["tokens"][i][experience["loss_mask"][i]].tolist())
        first[i] = key not in seen
        seen.add(key)
    return first
