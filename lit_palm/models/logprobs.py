"""Log-probabilities of given tokens without ever holding a batch x length x vocabulary tensor.

`TokenLogProbs` is a head: it runs inside the network's `forward`, projects only the selected positions onto the
vocabulary, one chunk of rows at a time, and gives log-probabilities, and entropies or softmax normalisers when asked:

    out = network(tokens_BT, head=TokenLogProbs(tokens_BT, loss_mask_BT))
    loss = -out["logps"].sum()
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_palm.models.half import widened
from lit_palm.models.products import product, weight_gradient
from lit_palm.types import sent

__all__ = ["TokenLogProbs"]


class TokenLogProbs:
    """A head that gives log p(tokens[b, t] | tokens[b, :t]) at [b, t], read from the hidden state at t - 1.

    Args:
        targets: [B, T] long, the tokens the network is run on.
        select: [B, T] bool, the tokens to compute; None: all. Position 0 is never predicted. On the host whatever the
            device of `targets`: how many are selected is then known without waiting for that.
        temperature: logits are divided by it.
        entropy: also give the entropy of each token's distribution.
        log_z: also give the log of its softmax normaliser.
        max_elements: largest number of logits alive at once; a smaller batch is projected in one piece.
        source: [B, T] long, where in the hidden states, flattened over rows and tokens, each token is predicted from;
            None: one token earlier, of a network that ran on `targets`.
        extras: names of what the network is to add to the result, of those in its own `extras`.

    Calling it gives a dict of [B, T] tensors in float32 (float64 for a float64 network), in nats: "logps", and
    "entropy" and "log_z" when asked for; zero where nothing was selected. Gradients flow to all three:
    with p the softmax, dlogp = onehot - p, dH = -p (log p + H), dlog Z = p.
    """

    def __init__(
        self,
        targets: Tensor,
        select: Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        log_z: bool = False,
        max_elements: int = 2**24,
        source: Tensor | None = None,
        extras: Collection[str] = (),
    ) -> None:
        assert temperature > 0, "log-probabilities need a temperature above 0"
        assert select is None or select.shape == targets.shape
        self.targets = targets
        self.select = select
        self.source = source
        self.temperature = temperature
        self.entropy = entropy
        self.log_z = log_z
        self.max_elements = max_elements
        self.extras = frozenset(extras)

    def __call__(self, hidden: Tensor, weight: Tensor, logit_scale: float) -> dict[str, Tensor]:
        """Run the head; see `lit_palm.models.base.Head`."""
        rows, width = self.targets.shape
        assert self.source is not None or hidden.shape[:2] == self.targets.shape, "targets: what the network ran on"
        flat = hidden.flatten(0, 1)
        place, before = self.places()
        picked = flat.index_select(0, before) * (logit_scale / self.temperature)
        device_type = hidden.device.type
        if torch.is_autocast_enabled(device_type):
            # cast here, where autograd casts back: backward runs outside autocast
            dtype = torch.get_autocast_dtype(device_type)
            picked, weight = picked.to(dtype), weight.to(dtype)
        chunk = max(1, self.max_elements // weight.shape[0])
        with torch.autocast(device_type, enabled=False):
            results = _ChunkedLogProbs.apply(
                picked, weight, self.targets.reshape(-1)[place], chunk, self.entropy, self.log_z
            )
        names = ["logps"] + ["entropy"] * self.entropy + ["log_z"] * self.log_z
        return {
            name: value.new_zeros(rows * width).index_copy(0, place, value).view(rows, width)
            for name, value in zip(names, results, strict=True)
        }

    def places(self) -> tuple[Tensor, Tensor]:
        """Where the selected tokens stand in the targets, flattened over rows and tokens, and where in the hidden
        states, flattened alike, each is predicted from: [N] long each."""
        rows, width = self.targets.shape
        if self.select is None:
            every = torch.arange(rows * width, device=self.targets.device)
            place = every.view(rows, width)[:, 1:].reshape(-1)
        else:
            place = F.pad(self.select[:, 1:], (1, 0)).reshape(-1).nonzero().squeeze(-1)
            place = sent(place, self.targets.device)
        return place, place - 1 if self.source is None else self.source.reshape(-1)[place]


class _ChunkedLogProbs(torch.autograd.Function):
    """hidden [N, D], weight [V, D], targets [N] -> log-probs (entropies, log normalisers), each [N]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, entropy: bool, log_z: bool
    ) -> tuple[Tensor, ...]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps, entropies, norms, kept = [], [], [], None
        table = widened(weight)
        for h, target in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            logits = product(h.to(table.dtype), table).to(h.dtype)
            if log_z:
                norms.append(torch.logsumexp(logits.to(wide), -1))
            log_p = torch.log_softmax(logits, -1, dtype=wide)
            del logits
            logps.append(log_p.gather(1, target[:, None]).squeeze(1))
            if entropy:
                entropies.append(-(log_p.exp().mul_(log_p)).sum(-1))
            if len(targets) <= chunk:
                kept = log_p
            del log_p
        results = [torch.cat(part) for part in (logps, entropies, norms) if part]
        ctx.chunk, ctx.entropy, ctx.log_z = chunk, entropy, log_z
        ctx.set_materialize_grads(False)  # an entropy that is only looked at costs nothing in backward
        ctx.save_for_backward(hidden, weight, targets, kept, results[1] if entropy else None)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, kept, entropies = ctx.saved_tensors
        left = list(grads)
        d_logp = left.pop(0)
        if d_logp is None:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            d_logp = torch.zeros(len(targets), dtype=wide, device=hidden.device)
        d_entropy = left.pop(0) if ctx.entropy else None
        d_log_z = left.pop(0) if ctx.log_z else None
        on_p = -d_logp if d_log_z is None else d_log_z - d_logp
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight: Tensor | None = None
        table = widened(weight)
        for start in range(0, max(1, len(targets)), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            h = hidden[part].to(table.dtype)
            log_p = kept
            if log_p is None:
                log_p = torch.log_softmax(product(h, table).to(hidden.dtype), -1, dtype=on_p.dtype)
            d_logits = log_p.exp()
            if d_entropy is None:
                d_logits.mul_(on_p[part, None])
            else:
                # what was kept must survive another backward pass
                factor = log_p + entropies[part, None] if kept is not None else log_p.add_(entropies[part, None])
                d_logits.mul_(factor.mul_(-d_entropy[part, None]).add_(on_p[part, None]))
                del factor
            del log_p
            d_logits.scatter_add_(1, targets[part, None], d_logp[part, None])
            d_logits = d_logits.to(table.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = product(d_logits, table.t())
            if need_weight:
                grad_weight = _add_gradient(grad_weight, d_logits, h, on_p.dtype)
            del d_logits
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None, None


def _add_gradient(total: Tensor | None, grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """total + the weight's gradient, in place and in `dtype`: a sum over chunks in bfloat16 would lose most of them."""
    if total is None:
        return weight_gradient(grad, x).to(dtype)
    return total.addmm_(grad.t(), x) if grad.dtype == dtype else total.add_(grad.t() @ x)
