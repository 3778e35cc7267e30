"""Compiled rotary positions against torch's operations in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_palm.models.layers import rotate
from lit_palm.models.rope_native import rotates
from lit_palm.native import find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


def tables(*shape: int) -> tuple[Tensor, Tensor]:
    """Any numbers: with xPos cosines and sines of a pair's halves are scaled, and need not be alike."""
    return torch.randn(*shape), torch.randn(*shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("head_dim", [2, 12, 64])
def test_parts_and_gradients_are_those_of_float64(dtype: torch.dtype, per_row: bool, head_dim: int) -> None:
    """Within a rounding of the result, of 24 bits or 8, and float32's of the two products that may cancel in it."""
    torch.manual_seed(0)
    rows, width, sizes = 3, 50, (4, 1)
    cos, sin = tables(*((rows, width) if per_row else (width,)), 1, head_dim)
    wide = torch.randn(rows, width, 7 * head_dim).to(dtype)
    grads = [torch.randn(rows, width, 2 * size, head_dim).to(dtype)[:, :, ::2] for size in sizes]  # with gaps
    results = []
    for kind in (dtype, torch.float64):
        leaf = wide.to(kind, copy=True).requires_grad_()
        x = leaf[..., head_dim : 6 * head_dim].unflatten(-1, (-1, head_dim))
        assert rotates(x, cos) is (kind is dtype)
        parts = rotate(x, (cos, sin), sizes)
        torch.autograd.backward(parts, [grad.to(kind) for grad in grads])
        assert leaf.grad is not None
        results.append([t.double() for t in (*parts, leaf.grad)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol={torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype], atol=2e-6)


def test_what_it_is_not_written_for_is_left_to_torch() -> None:
    cos, sin = tables(5, 1, 4)
    for x in (torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(5, 3, 4), torch.randn(0, 5, 3, 4)):
        assert not rotates(x, cos)
        assert rotate(x, (cos, sin))[0].shape == x.shape
    assert not rotates(torch.randn(2, 5, 3, 4), cos.double())
    assert not rotates(torch.randn(2, 5, 3, 4, device="meta"), cos)
