"""The small parts of a PaLM's block: linear maps, norms, rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_palm.models.half import FEWEST, linear, product_type, widens
from lit_palm.models.products import quick
from lit_palm.models.rope_native import rotate_parts, rotates
from lit_palm.models.weights import local

__all__ = ["Linear", "Norm", "QKNorm", "QuickLinear", "rotate"]

WITHOUT_GRADIENTS = 64
"""Rows from which a product that nothing is learned from makes up for packing a weight."""


class Linear(nn.Linear):
    """A bias-free linear map that is also quick for the few rows of a decoding step."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def part(self, x: Tensor, outputs: slice) -> Tensor | None:
        """Some of what `forward` gives; None where it would have to be computed whole."""
        return linear(x, self.weight[outputs])


class QuickLinear(nn.Linear):
    """A linear layer of somebody else's network, multiplied as a `Linear` is where that is quicker.

    That is for many rows in float32, which torch gives to MKL, and in 16 bits on processors without instructions for
    them.
    """

    @staticmethod
    def take_over(network: nn.Module) -> None:
        """Make the plain linear layers of a network such."""
        for module in network.modules():
            if type(module) is nn.Linear:
                module.__class__ = QuickLinear

    def forward(self, x: Tensor) -> Tensor:
        dtype, rows = product_type(x), x.shape[:-1].numel()
        packed = (
            dtype is torch.float32
            and (torch.is_grad_enabled() or rows >= WITHOUT_GRADIENTS)
            and quick(x, self.weight, dtype)
        )
        wide = widens(x, dtype) and widens(self.weight, dtype) and rows >= FEWEST
        if not (packed or wide):
            return super().forward(x)
        result = linear(x, self.weight)
        return result if self.bias is None else result + self.bias.to(result.dtype)


class Norm(nn.LayerNorm):
    """A bias-free LayerNorm, whose weight may be spread over processes that all normalise alike."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, local(self.weight), None, self.eps)


class QKNorm(nn.Module):
    """Normalises each head of queries or keys; see `PaLMConfig.qk_norm`."""

    def __init__(self, kind: str, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(head_dim if kind == "l2" else (num_heads, head_dim)))
        self.shared = False
        """Heads of other processes are normalised by this weight too, so its gradients are to be summed."""
        self.head: int | None = None
        """The one head of several that this process has, where each has a weight of its own."""

    def forward(self, x_BTHDh: Tensor) -> Tensor:
        if self.kind == "l2":
            normed = F.normalize(x_BTHDh, dim=-1)
        else:
            normed = F.layer_norm(x_BTHDh, x_BTHDh.shape[-1:], eps=self.eps)
        weight = local(self.weight, self.shared)
        return normed * (weight if self.head is None else weight[self.head])


def rotate(x: Tensor, rope: Sequence[Tensor], sizes: tuple[int, ...] | None = None) -> tuple[Tensor, ...]:
    """Apply RoPE to pairs (i, i + Dh/2) of every head of x [..., H, Dh], and split the heads into parts.

    Args:
        x: of any type.
        rope: cosines and sines, float32 or wider, that are broadcast against x; the sines of a pair's first half with
            a minus sign.
        sizes: how many heads there are to be in each part; None: all in one.
    """
    cos, sin = rope
    sizes = sizes or (x.shape[-2],)
    if rotates(x, cos):
        return rotate_parts(x, cos, sin, sizes)
    # the tables are float32 (or wider): a bfloat16 product would lose the phase of distant positions
    rotated = torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
    return rotated.split_with_sizes(sizes, -2)
