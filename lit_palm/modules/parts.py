"""A minibatch run without its padding: the same sums for less work, and so the same update up to rounding.

A network that takes `sequences` runs the real tokens of all rows side by side. Another one, such as that of a Hugging
Face model, runs rows of similar length together, in as many passes as pay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_palm.models.base import Network, ScalarNetwork
from lit_palm.models.side_by_side import SideBySide, side_by_side
from lit_palm.parallel.sharded import bare
from lit_palm.rollout.lengths import cost_of_a_pass, parts_of_similar_length
from lit_palm.types import Experience, Output

__all__ = ["in_parts", "laid", "scalars"]


def scalars(network: nn.Module, batch: Experience) -> Tensor:
    """What a `ScalarNetwork` says at the tokens that targets are predicted from, [B, T]; elsewhere, anything."""
    packed = laid(network, batch)
    if packed is None:
        values: Tensor = network(batch["tokens"])
        return values
    values = network(packed.tokens, positions=packed.positions, sequences=packed.sequences)
    return values


def laid(network: nn.Module, batch: Experience) -> SideBySide | None:
    """The rows of a batch side by side, with their targets' predictions to be read; None: as they are."""
    if not _lays(network, batch):
        return None
    network, rows = bare(network), batch.host
    trunk = cast(Network, network.trunk if isinstance(network, ScalarNetwork) else network)
    # a running mean is of all tokens
    depth = None if isinstance(network, ScalarNetwork) and network.pooling == "mean" else len(trunk.blocks())
    device = batch["tokens"].device
    return side_by_side(rows["tokens"], rows["mask"], rows["loss_mask"], rows["group"], depth, device)


def _lays(network: nn.Module, batch: Experience) -> bool:
    """Whether a network runs the rows of a batch side by side."""
    network = bare(network)
    trunk = network.trunk if isinstance(network, ScalarNetwork) else network
    if not isinstance(trunk, Network) or "group" not in batch or "documents" in batch:
        return False
    return trunk.takes_sequences and batch["tokens"].shape[1] <= trunk.config.max_length


def in_parts(
    batch: Experience,
    compute: Callable[[Experience], Output],
    networks: Iterable[nn.Module],
    together: bool = False,
) -> Output:
    """What `compute` gives for a minibatch.

    Rows stay together where all networks run them side by side; on an accelerator, since cutting them would mean to
    wait for it; packed ones, which are of one length; and those without a group, which a data module has
    sorted by length where that was asked for.

    Args:
        batch: B rows.
        compute: gives fields [b, t] (or [b]) for some of the rows, which are cut to their longest.
        networks: that it runs.
        together: rows stay together, as where networks are sharded: each pass needs all processes, whose rows differ.
    """
    tokens = batch["tokens"]
    alike = "documents" in batch or "group" not in batch
    if together or not tokens.is_cpu or alike or all(_lays(n, batch) for n in networks):
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
