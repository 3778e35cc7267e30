"""Prompts with the completion of another row: from them unpaired objectives estimate how far the policy has moved.

KTO compares a completion's reward with the divergence of policy and reference, estimated on completions that have
nothing to do with the prompt (Ethayarajh et al. 2024, section 4.1). They are made when a batch is put together.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lit_palm.data.packing import Windows
from lit_palm.types import Experience

__all__ = ["add_mismatched"]


def add_mismatched(
    batch: Experience, windows: Windows, rows: NDArray[np.int64], pad_id: int, longest: int | None, prefix: int
) -> Experience:
    """A batch of B rows, then each of its prompts again with the completion of the next row.

    The next row of the last is the first; of a batch with one row it is the next one in the data. When both parts are
    too long together, the beginning of the prompt is cut off, as in rows of the data that are too long.

    Args:
        batch: the rows as they are, with `row` and `group`.
        windows: all rows of the data, one piece each.
        rows: [B] which of them these are.
        pad_id: fills rows up.
        longest: longest row in tokens; None: any.
        prefix: tokens at the beginning of each prompt that always stay (BOS).

    Returns:
        The batch with 2 B rows: the new ones have `mismatched` True, `row` -1, a `group` of their own that no other row
        has (below zero) and False or zero in all other fields. They learn from the completion's tokens, unless the row
        whose prompt they have is without weight.
    """
    others = np.roll(rows, -1) if len(rows) > 1 else (rows + 1) % len(windows)
    parts = [_joined(windows, *pair, longest, prefix) for pair in zip(rows.tolist(), others.tolist(), strict=True)]
    size, width = len(rows), max(batch["tokens"].shape[1], *(len(tokens) for tokens, _ in parts))
    tokens = np.full((size, width), pad_id, np.int64)
    mask, loss_mask = np.zeros((2, size, width), np.bool_)
    counted = batch["loss_mask"].any(1).tolist()
    for i, (ids, targets) in enumerate(parts):
        tokens[i, : len(ids)] = ids
        mask[i, : len(ids)] = True
        # as everywhere, the first token of a row is never predicted
        loss_mask[i, 1 : len(ids)] = targets[1:] & counted[i]
    more = {
        "tokens": torch.from_numpy(tokens),
        "mask": torch.from_numpy(mask),
        "loss_mask": torch.from_numpy(loss_mask),
        "row": torch.full((size,), -1),
        "group": -1 - torch.from_numpy(rows),
        "mismatched": torch.ones(size, dtype=torch.bool),
    }
    batch["mismatched"] = torch.zeros(size, dtype=torch.bool)
    whole = {name: _below(value, more.get(name), pad_id if name == "tokens" else 0) for name, value in batch.items()}
    return Experience(whole)


def _joined(
    windows: Windows, row: int, other: int, longest: int | None, prefix: int
) -> tuple[NDArray[np.integer], NDArray[np.bool_]]:
    """Ids and targets of one row's prompt with the other's completion."""
    (prompt, _), (ids, targets) = _split(windows, row)[0], _split(windows, other)[1]
    excess = max(len(prompt) + len(ids) - (longest or len(prompt) + len(ids)), 0)
    prompt = np.concatenate([prompt[:prefix], prompt[prefix + excess :]])
    return np.concatenate([prompt, ids]), np.concatenate([np.zeros(len(prompt), np.bool_), targets])


Part = tuple[NDArray[np.integer], NDArray[np.bool_]]


def _split(windows: Windows, row: int) -> tuple[Part, Part]:
    """Prompt and completion of a row, each ids and targets; the completion begins with the first target."""
    assert windows.targets is not None
    where = slice(windows.starts[row], windows.starts[row] + windows.lengths[row])
    ids, targets = np.asarray(windows.tokens[where]), np.asarray(windows.targets[where])
    start = int(targets.argmax())
    return (ids[:start], targets[:start]), (ids[start:], targets[start:])


def _below(above: Tensor, below: Tensor | None, fill: int) -> Tensor:
    """Two blocks of rows as one, the upper one filled up to the width of the lower."""
    if below is None:
        below = torch.zeros_like(above)
    if above.dim() == 2 and below.shape[1] > above.shape[1]:
        above = torch.nn.functional.pad(above, (0, below.shape[1] - above.shape[1]), value=fill)
    return torch.cat([above, below])
