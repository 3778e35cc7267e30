"""Rows cut into parts of similar length, so that little is computed on padding.

A part is padded to its longest row, and costs something whatever its size: the weights are read once more, and every
operation is called once more. The cut is the one of the least cost, where that is counted in tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["by_length", "cost_of_a_pass", "parts_of_similar_length"]

ON_THE_HOST = 64
"""Tokens that a further pass costs there: reading 120 MB of weights takes as long as computing 12 to 20 tokens of
that network, and calling the operations of a network of 1M parameters as long as 30 of its tokens."""

ON_A_DEVICE = 4096
"""The same on an accelerator, which computes thousands of tokens while it is told what to do."""


def cost_of_a_pass(device: torch.device) -> int:
    """Tokens that one more pass costs, by what the device is."""
    return ON_THE_HOST if device.type == _HOST.type else ON_A_DEVICE


_HOST = torch.Generator().device


def by_length(length: Tensor, group: Tensor) -> Tensor:
    """Rows [B] from the longest to the shortest, those of a group side by side (they may share their prompt).

    Args:
        length: [B] long, in tokens.
        group: [B] long.
    """
    _, which = group.unique(return_inverse=True)
    longest = torch.zeros(int(which.max()) + 1, dtype=length.dtype).scatter_reduce(0, which, length, "amax")[which]
    by_group = which.argsort(stable=True)
    return by_group[longest[by_group].argsort(descending=True, stable=True)]


def parts_of_similar_length(length: Tensor, fixed: int, group: Tensor | None = None, most: int = 2**31) -> list[Tensor]:
    """Cut rows into parts so that padded tokens, and `fixed` for each part, are fewest.

    Args:
        length: [B] long, on the CPU.
        fixed: tokens that a part costs beside its own.
        group: [B] long: rows that stay in one part if it can hold them; None: each row for itself.
        most: rows of a part.

    Returns:
        The rows of each part, from long to short. One part alone has the rows in their order.
    """
    rows = len(length)
    if rows <= most and rows * int(length.max()) - int(length.sum()) <= fixed:
        return [torch.arange(rows)]
    order = by_length(length, torch.arange(rows) if group is None else group)
    ends = _ends(order if group is None else group[order], most)
    start = torch.cat([torch.zeros(1, dtype=torch.long), ends])
    width = [int(length[order[a:b]].max()) for a, b in zip(start[:-1].tolist(), start[1:].tolist(), strict=True)]
    # cheapest[j]: what rows up to start[j] cost at least, in parts of which the last begins at start[begin[j]]
    cheapest = torch.full((len(start),), 2**62)
    cheapest[0] = 0
    begin = torch.zeros(len(start), dtype=torch.long)
    for i, widest in enumerate(width):
        rows_to = start[i + 1 :] - start[i]
        cost = torch.where(rows_to <= most, cheapest[i] + fixed + rows_to * widest, 2**62)
        better = cost < cheapest[i + 1 :]
        cheapest[i + 1 :] = torch.where(better, cost, cheapest[i + 1 :])
        begin[i + 1 :] = torch.where(better, i, begin[i + 1 :])
    parts, j = [], len(start) - 1
    while j > 0:
        i = int(begin[j])
        parts.append(order[int(start[i]) : int(start[j])])
        j = i
    return parts[::-1] if len(parts) > 1 else [torch.arange(rows)]


def _ends(group: Tensor, most: int) -> Tensor:
    """Where parts may end: after the rows of a group, or every `most` rows within it."""
    _, counts = group.unique_consecutive(return_counts=True)
    ends, place = [], 0
    for count in counts.tolist():
        ends += [place + end for end in range(most, count, most)] + [place + count]
        place += count
    return torch.tensor(ends)
