"""Compiled causal attention and SwiGLU against torch's in float64, alone and within a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.models import PaLMConfig, TokenLogProbs, causal, half, kernels
from lit_palm.models.causal import causal_attention, pays
from lit_palm.models.half import attention
from lit_palm.models.kernels import split_swiglu
from lit_palm.native import find_compiler

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

# of the norm: float32 keeps 24 bits, sums are of up to 4,000 numbers; of bfloat16's 2^-9 of each number two or three
# add up, where torch's own kernel is off by up to .01
OFF = {torch.float32: 2e-6, torch.bfloat16: 5e-3}


def off(one: Tensor | None, other: Tensor | None) -> float:
    assert one is not None and other is not None
    return float(((one.double() - other).norm() / other.norm()).detach())


def check(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], looser: float = 1.0) -> None:
    """Results and gradients of flat sequences against those of each alone, in float64."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    grad = torch.randn(q.shape).to(q.dtype)
    got = causal_attention(*leaves, lengths)
    got.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    parts = [[t.transpose(0, 1)[None] for t in part] for part in zip(*(t.split(lengths) for t in exact), strict=True)]
    done = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True)[0].transpose(0, 1) for part in parts]
    expected = torch.cat(done)
    expected.backward(grad.double())
    limit = OFF[q.dtype] * looser
    assert got.dtype is q.dtype and off(got, expected) < limit
    for mine, theirs in zip(leaves, exact, strict=True):
        assert mine.grad is not None and mine.grad.dtype is q.dtype and off(mine.grad, theirs.grad) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 1, 64), (4, 4, 32), (6, 2, 32), (3, 1, 128), (2, 1, 256)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sequences_of_any_length(dtype: torch.dtype, heads: int, kv_heads: int, width: int, threads: int) -> None:
    """Of one token, of a block and one more, of several blocks of keys."""
    torch.manual_seed(0)
    lengths, usual = [1, 96, 97, 300, 15, 33], torch.get_num_threads()
    q = torch.randn(sum(lengths), heads, width).to(dtype)
    k, v = (torch.randn(sum(lengths), kv_heads, width).to(dtype) for _ in range(2))
    torch.set_num_threads(threads)
    try:
        check(q, k, v, lengths)
    finally:
        torch.set_num_threads(usual)


def test_more_heads_than_a_block_has_rows() -> None:
    torch.manual_seed(0)
    check(torch.randn(40, 100, 32), torch.randn(40, 1, 32), torch.randn(40, 1, 32), [40])


@pytest.mark.parametrize("layout", ["as the block gives them", "heads first", "every other number"])
def test_any_layout(layout: str) -> None:
    torch.manual_seed(0)
    if layout == "as the block gives them":
        fused = torch.randn(50, 10, 32)
        q, k, v = fused[:, :6], fused[:, 6:8], fused[:, 8:]
    elif layout == "heads first":
        q, k, v = (torch.randn(heads, 50, 32).transpose(0, 1) for heads in (6, 2, 2))
    else:
        q, k, v = (torch.randn(50, heads, 64)[:, :, ::2] for heads in (6, 2, 2))
    check(q, k, v, [30, 20])


def test_large_scores() -> None:
    """Weights of nearly 0 and 1, and rows whose largest score comes in a later block of keys.

    Scores of some hundreds are themselves rounded by 1e-5, and so much are weights and gradients off.
    """
    torch.manual_seed(0)
    check(*(torch.randn(600, heads, 32) * 12 for heads in (2, 1)), torch.randn(600, 1, 32), [600], looser=20)


def test_what_is_no_number_stays_none() -> None:
    q, k, v = (torch.randn(40, 1, 32) for _ in range(3))
    k[20] = torch.nan
    found = causal_attention(q, k, v, [40])
    assert found[:20].isfinite().all() and found[20:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_one_length(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """By way of what a network calls; the same under autocast."""
    taken: list[int] = []
    monkeypatch.setattr(half, "causal_attention", lambda *given: taken.append(1) or causal_attention(*given))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 50, 32) for heads in (4, 1, 1))
    exact = [t.to(dtype).double() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    found = attention(*(t.to(dtype) for t in (q, k, v)), is_causal=True, enable_gqa=True)
    assert off(found, expected) < OFF[dtype]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        assert torch.equal(attention(q, k, v, is_causal=True, enable_gqa=True), found)
    assert len(taken) == 2


@pytest.mark.parametrize("change", ["bias", "dropout", "cached", "float64", "width", "compiling", "no rows"])
def test_other_attention_is_left_to_torch(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "causal_attention", None)
    q, k = (torch.randn(1, 2, 50, 32) for _ in range(2))
    options: dict[str, Any] = {"is_causal": change != "bias", "dropout_p": 0.1 if change == "dropout" else 0.0}
    if change == "cached":
        q = q[:, :, :10]
    elif change == "float64":
        q, k = q.double(), k.double()
    elif change == "width":
        q, k = q[..., :8], k[..., :8]
    elif change == "no rows":
        q, k = q[:0], k[:0]
    called = torch.compile(attention, backend="eager") if change == "compiling" else attention
    called(q, k, k, torch.zeros(50, 50) if change == "bias" else None, **options)


def test_too_little_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def attend_float32(self, *_: Any) -> int:
            return 2

    monkeypatch.setattr(causal, "compiled", lambda _: Library())
    with pytest.raises(MemoryError, match="40 tokens"):
        causal_attention(*(torch.randn(40, 1, 32) for _ in range(3)), [40])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", [32, 96])
def test_swiglu(dtype: torch.dtype, inner: int) -> None:
    """The parts before gate and up come through as they are; extremes too. bfloat16 is rounded once."""
    torch.manual_seed(0)
    sizes = (7, 5, inner, inner)
    fused = torch.randn(3, 11, sum(sizes)) * 3
    fused[0, 0, 12:20] = torch.tensor([-200.0, -90.0, -88.0, -0.0, 0.0, 87.0, 90.0, 200.0])
    fused = fused.to(dtype).requires_grad_()
    exact = fused.detach().double().requires_grad_()
    got = split_swiglu(fused, sizes)
    *parts, gate, up = exact.split(sizes, -1)
    expected = *parts, F.silu(gate) * up
    grads = [torch.randn(t.shape).to(dtype) for t in got]
    torch.autograd.backward(got, grads)
    torch.autograd.backward(expected, [g.double() for g in grads])
    limit = 2e-6 if dtype is torch.float32 else 2**-8
    for mine, theirs in zip((*got, fused.grad), (*expected, exact.grad), strict=True):
        assert mine is not None and theirs is not None and mine.dtype is dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=limit, atol=limit)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_network_gives_the_same(
    precision: torch.dtype, packed: bool, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities and gradients by torch's own operations: within the rounding of the type."""
    torch.manual_seed(0)
    size = {"vocab_size": 50, "d_model": 32, "num_layers": 2, "num_heads": 4, "head_dim": 32, "d_ffn": 64}
    network = PaLMConfig(**size, activation_checkpointing=checkpointing).build()
    tokens = torch.randint(0, 50, (2, 150))
    documents = torch.arange(150).div(40, rounding_mode="floor").expand(2, -1) if packed else None

    def results() -> list[Tensor]:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            out = network(tokens, documents=documents, head=TokenLogProbs(tokens))
        out["logps"].mean().backward()
        return [out["logps"].detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]

    mine = results()
    taken = pays(torch.empty(1, 32), torch.empty(1, 32), torch.float32, 0.0)
    assert taken
    monkeypatch.setattr(half, "pays", lambda *_: False)
    monkeypatch.setattr(kernels, "swiglu", lambda *_: None)
    monkeypatch.setattr(kernels, "swiglu_backward", lambda *_: False)
    limit = 1e-5 if precision is torch.float32 else 2e-2
    for got, expected in zip(mine, results(), strict=True):
        assert off(got, expected.double()) < limit
