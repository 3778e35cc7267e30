"""A minibatch run in parts of similar length: the same sums, with less computed on padding.

The loss still sees the whole minibatch, so that the update is the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.rollout.lengths import cost_of_a_pass, parts_of_similar_length
from lit_palm.types import Experience, Output

__all__ = ["in_parts"]


def in_parts(batch: Experience, compute: Callable[[Experience], Output], together: bool = False) -> Output:
    """What `compute` gives for a minibatch.

    On an accelerator rows stay together, since telling their lengths would mean to wait for it; so do packed rows,
    which are of one length.

    Args:
        batch: B rows.
        compute: gives fields [b, t] (or [b]) for some of the rows, which are cut to their longest.
        together: rows stay together, as where networks are sharded: each pass needs all processes, whose rows differ.
    """
    tokens = batch["tokens"]
    if together or not tokens.is_cpu or "documents" in batch:
        return compute(batch)
    parts = parts_of_similar_length(batch["mask"].sum(1), cost_of_a_pass(tokens.device), batch.get("group"))
    if len(parts) == 1:
        return compute(batch)
    found = [compute(batch.select(rows)) for rows in parts]
    place, width = torch.cat(parts).argsort(), tokens.shape[1]
    merged = {field.name: _merged([getattr(f, field.name) for f in found], place, width) for field in fields(Output)}
    return Output(**merged)


def _merged(values: list[Any], place: Tensor, width: int) -> Any:
    """One field of all rows, in their order, from those of the parts."""
    if values[0] is None:
        return None
    if isinstance(values[0], dict):
        return {name: _merged([v[name] for v in values], place, width) for name in values[0]}
    if values[0].dim() > 1:
        values = [F.pad(v, (0, width - v.shape[1])) for v in values]
    return torch.cat(values)[place]
