"""What makes the network quick: ordinary functions with the same results in fewer passes over memory.

A parallel block is one wide matrix product followed by cheap arithmetic on a wide tensor, and on a CPU the cheap part
costs time in proportion to the memory it touches. `thin_linear` is for decoding, `split_swiglu` for training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_palm.models.swiglu_native import swiglu, swiglu_backward

__all__ = ["last_logits", "recomputed", "split_swiglu", "thin_linear"]

PIECE = 2**18
"""Numbers of SwiGLU's inner width that its backward pass takes at a time on a CPU."""


def thin_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., I] times weight [O, I] transposed: `F.linear`, computed the other way round where that is quicker.

    On a CPU the float32 kernel for a handful of rows makes poor use of several threads; weight @ x.T does not
    (measured 1.8 times as fast for 16 rows on two). Without gradients only, since the result's layout is transposed.
    """
    if not torch.is_grad_enabled() and x.is_cpu and x.dtype is torch.float32 is weight.dtype:
        rows = x.numel() // x.shape[-1]
        if 8 < rows < 48:
            return (weight @ x.reshape(rows, -1).t()).t().view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def last_logits(hidden: Tensor, weight: Tensor, logit_scale: float) -> Tensor:
    """A head: the logits that follow each row's last token, [B, V] in float32 (or wider)."""
    logits = thin_linear(hidden[:, -1] * logit_scale, weight)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()


def split_swiglu(fused: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Split the last dimension into parts ..., gate, up: the parts before them as views, then silu(gate) * up.

    SwiGLU (Shazeer 2020). The backward pass recomputes silu instead of keeping it, and writes the gradient of `fused`
    in place rather than joining the gradients of its parts.

    Args:
        fused: [B, T, sum(sizes)].
        sizes: widths of the parts; the last two are equal.
    """
    if torch.is_grad_enabled() and fused.requires_grad and not torch.compiler.is_compiling():
        return _SplitSwiGLU.apply(fused, sizes)
    return _split(fused, sizes)


def _split(fused: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    *parts, gate, up = fused.split_with_sizes(sizes, -1)
    if torch.compiler.is_compiling() or (hidden := swiglu(fused, sizes[-1])) is None:
        hidden = F.silu(gate).mul_(up)
    return *parts, hidden


@contextmanager
def recomputed(hidden: Tensor) -> Iterator[None]:
    """What is computed in here from a result of `split_swiglu` does not keep it for its backward pass.

    It is computed again from `fused`, which that of `split_swiglu` keeps anyway: a tensor of the feed-forward's inner
    width less for a pass over memory more.
    """
    made_by = hidden.grad_fn
    if type(made_by) is not _SplitSwiGLU._backward_cls:  # type: ignore[attr-defined]
        yield
        return
    node: Any = made_by
    place, size = hidden.data_ptr(), hidden.numel()

    def pack(kept: Tensor) -> Any:
        same = kept.data_ptr() == place and kept.numel() == size and kept.is_contiguous()
        return kept.shape if same else kept

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return _split(node.saved_tensors[0], node.sizes)[-1].view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _SplitSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(fused)
        ctx.sizes = sizes
        return _split(fused, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (fused,) = ctx.saved_tensors
        sizes = ctx.sizes
        out = torch.empty_like(fused)
        for part, grad in zip(out.split_with_sizes(sizes, -1), grads[:-1], strict=False):
            part.copy_(grad)
        if swiglu_backward(fused, grads[-1], out):
            return out, None
        # on a CPU go by pieces that stay in its cache; elsewhere every piece would be another kernel launch
        rows = max(1, PIECE // sizes[-1]) if fused.is_cpu else fused.numel()
        pieces = (t.flatten(0, -2).split(rows) for t in (fused, out, grads[-1]))
        for values, to, grad in zip(*pieces, strict=True):
            *_, gate, up = values.split_with_sizes(sizes, -1)
            *_, grad_gate, grad_up = to.split_with_sizes(sizes, -1)
            torch.mul(grad, F.silu(gate), out=grad_up)
            torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out, None
