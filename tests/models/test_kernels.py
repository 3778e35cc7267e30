"""Kernels against the plain formula; float32 results within rounding of sums over at most 200 terms (1e-5)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.models.kernels import last_logits, split_swiglu, thin_linear


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 47, 48, 64])
@pytest.mark.parametrize("shape", ["two", "three"])
def test_thin_linear_is_linear(rows: int, shape: str) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 200), torch.randn(70, 200)
    x = x if shape == "two" else x[:, None]
    expected = x.double() @ weight.double().T
    with torch.no_grad():
        torch.testing.assert_close(thin_linear(x, weight).double(), expected, rtol=1e-5, atol=1e-4)
        # its output, transposed in memory, is what the next one reads
        again = thin_linear(thin_linear(x, weight), weight.T[:150].contiguous()[:, :70])
    torch.testing.assert_close(again.double(), expected @ weight.double()[:, :150], rtol=1e-5, atol=1e-3)
    weight.requires_grad_()
    thin_linear(x, weight).sum().backward()
    assert weight.grad is not None


def test_last_logits_reads_the_last_position_in_float32() -> None:
    hidden, weight = torch.randn(3, 5, 8), torch.randn(11, 8)
    logits = last_logits(hidden, weight, 0.5)
    torch.testing.assert_close(logits, hidden[:, -1] @ weight.T * 0.5)
    assert last_logits(hidden.bfloat16(), weight.bfloat16(), 0.5).dtype is torch.float32


def plain(fused: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    *parts, gate, up = fused.split(sizes, -1)
    return *parts, F.silu(gate) * up


@pytest.mark.parametrize("sizes", [(3, 2, 4, 4), (5, 5)])
def test_split_swiglu_gradients_are_those_of_the_formula(sizes: tuple[int, ...]) -> None:
    fused = torch.randn(2, 3, sum(sizes), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: split_swiglu(x, sizes), (fused,))
    for got, expected in zip(split_swiglu(fused, sizes), plain(fused, sizes), strict=True):
        assert torch.equal(got, expected)
    with torch.no_grad():
        for got, expected in zip(split_swiglu(fused, sizes), plain(fused, sizes), strict=True):
            assert torch.equal(got, expected)


def test_split_swiglu_in_several_pieces_and_with_an_unused_part() -> None:
    sizes = (8, 2**16, 2**16)  # four rows to a piece
    fused = torch.randn(1, 10, sum(sizes), requires_grad=True)
    weights = torch.randn(1, 10, 2**16)
    (expected,) = torch.autograd.grad((plain(fused, sizes)[1] * weights).sum(), fused)
    (got,) = torch.autograd.grad((split_swiglu(fused, sizes)[1] * weights).sum(), fused)
    torch.testing.assert_close(got, expected)
