"""The data that travels between rooms: `Experience` in, `Output` from the networks, `Loss` out.

Legend of tensor shapes, used as a suffix where it helps (`logits_BTV`, `mask_BT`):

    B  rows of a batch (one row: one prompt with one completion, or one packed window)
    T  tokens of a row, right-padded
    V  vocabulary
    D  width of the network (d_model)
    H  attention heads, K key/value heads, Dh width of one head
    S  slots of a key/value cache
    N  selected tokens, flattened over B and T

Every per-token field is aligned with the token it speaks about: `logps[b, t]` is the log-probability of `tokens[b, t]`
given `tokens[b, :t]`, `values[b, t]` the value of the state in which `tokens[b, t]` was chosen. Position 0 is never
predicted, so it is zero there. Log-probabilities are in nats.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Experience", "Loss", "Output", "has_float64", "sent"]


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; some accelerators do not."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (TypeError, RuntimeError):
        return False
    return True


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for what the device is doing, where it can copy by itself."""
    if tensor.device == device:
        return tensor
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if tensor.is_cpu and accelerator is not None and accelerator.type == device.type:
        if hasattr(torch.get_device_module(device), "Stream"):  # from memory that stays where it is until it is done
            return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Experience(dict[str, Any]):
    """A batch of rows as a dictionary with attribute access; it gains fields on its way and never travels back.

    Values are tensors whose first dimension is the row, or lists with one element a row. Which fields exist:

    ============  ===========  =====================================================================================
    field         shape        meaning
    ============  ===========  =====================================================================================
    tokens        [B, T] long  token ids, right-padded
    mask          [B, T] bool  True where a token is real (not padding)
    loss_mask     [B, T] bool  True where a token is learned from: it is a target (text), or belongs to a completion
    positions     [B, T] long  position of a token in its document; absent: counted from the start of the row
    documents     [B, T] long  document of a token in a packed row, -1 on padding; absent: one document a row
    group         [B] long     rows that answer the same prompt share a group (preferences, several completions)
    rank          [B] long     place in a human ranking, 0 is best; equal ranks are ties (preferences)
    rating        [B] float    what people gave the answer (ratings)
    label         [B] bool     whether people wanted the answer (unpaired feedback)
    mismatched    [B] bool     the completion answers another prompt: for estimates of the KL only (unpaired feedback)
    margin        [B] float    by how much the better answer of a pair was preferred (pairs, optional)
    row           [B] long     global number of the row in the collection (rollouts)
    scores        [B] float    weighted sum of the rewards, one for each completion (rollouts)
    token_rewards [B, T]       what rewards said of single tokens, weighted; a part of the scores, zero outside
                               `loss_mask` (rollouts with such a reward)
    ended         [B] bool     the completion ended by itself, with EOS or a stop sequence (rollouts)
    old_logps     [B, T]       log-probabilities under the policy that sampled, as training computes them (when an
                               objective needs `old_logps`)
    rollout_logps [B, T]       the same as the engine reported them (when an objective needs `rollout_logps`)
    ref_logps     [B, T]       log-probabilities under the frozen reference (when an objective needs `reference`)
    values        [B, T]       state values at collection time (when an objective needs `value`)
    rewards       dict         name -> [B], the rewards before weighting (rollouts; not sliced into minibatches)
    metrics       dict         name -> float, what `prepare` wants logged once for the collection (not sliced)
    ============  ===========  =====================================================================================

    An objective adds its own fields in `prepare`.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this experience has no field {name!r}; it has {sorted(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def to(self, device: torch.device) -> Experience:
        """The batch on a device, where `host` still gives it as it is here. Lightning moves batches by this."""
        moved = Experience({k: sent(v, device) if isinstance(v, Tensor) else v for k, v in self.items()})
        moved.__dict__["twins"] = {name: (moved[name], value) for name, value in self.items()}
        return moved

    @property
    def host(self) -> Experience:
        """The batch as the host has it still, where it was moved to a device; fields changed since then as they are.

        What decides shapes (which tokens are learned from, which rows make pairs) is found here: to find it on the
        device would mean to wait until it has done all that it was given to do.
        """
        twins = self.__dict__.get("twins", {})
        found = {name: twins.get(name, (None, None)) for name in self}
        return Experience({k: found[k][1] if found[k][0] is value else value for k, value in self.items()})

    @property
    def num_rows(self) -> int:
        """Number of rows B."""
        return len(self["tokens"])

    def select(self, rows: Sequence[int] | Tensor) -> Experience:
        """The given rows, in the given order, cut to their longest row (trailing padding removed)."""
        index = torch.as_tensor(rows, dtype=torch.long)
        length = int(self["mask"][index].sum(1).max()) if len(index) else 0
        width = self["tokens"].shape[1]
        picked = Experience()
        for name, value in self.items():
            if isinstance(value, Tensor):
                value = value[index.to(value.device)]
                if value.dim() >= 2 and value.shape[1] == width:
                    value = value[:, :length]
                picked[name] = value
            elif isinstance(value, list):
                picked[name] = [value[i] for i in index.tolist()]
        return picked


@dataclass
class Output:
    """What the networks computed on an experience; fields an objective did not ask for are None.

    Args:
        logps: [B, T] log-probability of each token, in nats, at the sampling temperature; zero outside `loss_mask`.
        entropy: [B, T] entropy of the distribution each token was drawn from, in nats.
        log_z: [B, T] log of the softmax normaliser (for the z-loss).
        values: [B, T] state values (with gradient).
        scores: [B] score at the last real token of each row (reward models).
        ref_logps: [B, T] log-probabilities under the reference (offline objectives; rollouts carry theirs).
        extra: [B, T] each, by name: what the network gives beside, where an objective asks for it in its `extras`.
    """

    logps: Tensor | None = None
    entropy: Tensor | None = None
    log_z: Tensor | None = None
    values: Tensor | None = None
    scores: Tensor | None = None
    ref_logps: Tensor | None = None
    extra: dict[str, Tensor] | None = None


@dataclass
class Loss:
    """A summed loss with its metrics.

    Args:
        total: the loss summed over the rows of the micro-batch (a scalar), or one such sum by the name of each term
            when terms are divided by different weights. It is never averaged: the host divides by the weight of the
            whole optimiser step, over all micro-batches and ranks.
        metrics: name -> (sum, count); what is logged is sum / count.
        frozen: names of networks that this step must not change (for example the policy while the value warms up).
    """

    total: Tensor | dict[str, Tensor]
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
