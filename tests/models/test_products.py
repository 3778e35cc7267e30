"""Large products and causal attention of a processor against torch's in float64.

Both are taken on processors with AVX-512 alone. Here they run on any: what decides is replaced, and where this build of
torch has no such product, so is the product itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.models import PaLMConfig, TokenLogProbs, causal, half, products
from lit_palm.models.causal import SHORTEST
from lit_palm.models.half import attention, linear
from lit_palm.models.products import FEWEST_ROWS, PIECE, multiplies_quickly, packs, product, quick, weight_gradient

# float32 keeps 24 bits; sums of n numbers are off by some sqrt(n) units in the last place of the largest of them
EXACT = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A processor on which both are quicker; which of them were taken."""
    taken: list[str] = []
    multiply, attend = products._product, half.causal_attention
    if not torch.backends.mkldnn.is_available():
        multiply = F.linear

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        taken.append("product")
        return multiply(x, weight)

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        taken.append("attention")
        return attend(q, k, v)

    monkeypatch.setattr(products, "multiplies_quickly", lambda: True)
    monkeypatch.setattr(causal, "multiplies_quickly", lambda: True)
    monkeypatch.setattr(products, "_product", counted)
    monkeypatch.setattr(half, "causal_attention", attended)
    yield taken


@pytest.mark.parametrize("rows", [FEWEST_ROWS - 1, FEWEST_ROWS, 100])
@pytest.mark.parametrize(("inputs", "outputs"), [(40, 24), (24, 40), (32, 32)])
def test_products_and_their_gradients_are_those_of_float64(
    chosen: list[str], rows: int, inputs: int, outputs: int
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 1, inputs, requires_grad=True), torch.randn(outputs, inputs, requires_grad=True)
    grad = torch.randn(rows, 1, outputs)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = F.linear(*exact)
    expected.backward(grad.double())
    got = linear(x, weight)
    got.backward(grad)
    assert bool(chosen) is (rows >= FEWEST_ROWS)
    assert weight.grad is not None and weight.grad.is_contiguous()
    for mine, theirs in zip((got, x.grad, weight.grad), (expected, exact[0].grad, exact[1].grad), strict=True):
        torch.testing.assert_close(mine, theirs.float(), **EXACT)


def test_factors_may_lie_in_memory_as_they_like() -> None:
    torch.manual_seed(0)
    gaps, flat, lying = torch.randn(64, 30)[:, ::2], torch.randn(40, 15), torch.randn(15, 40).t()
    for weight in (flat, lying, torch.randn(80, 15)[::2], torch.randn(40, 30)[:, ::2]):
        torch.testing.assert_close(product(gaps, weight), gaps @ weight.t(), **EXACT)
    wide = torch.randn(64, 2 * PIECE + 3)  # in pieces
    for grad in (torch.randn(64, 40), torch.randn(64, 80)[:, ::2], wide):
        torch.testing.assert_close(weight_gradient(grad, gaps), grad.t() @ gaps, **EXACT)


def test_what_needs_no_gradient_gets_none_and_one_number_may_be_that_of_all() -> None:
    torch.manual_seed(0)
    factors = torch.randn(64, 15), torch.randn(40, 15)
    for which in (0, 1):
        mine, exact = [t.clone() for t in factors], [t.double() for t in factors]
        mine[which].requires_grad_(), exact[which].requires_grad_()
        linear(*mine).sum().backward()
        F.linear(*exact).sum().backward()
        torch.testing.assert_close(mine[which].grad, exact[which].grad.float(), **EXACT)  # type: ignore[union-attr]
        assert mine[1 - which].grad is None


def test_other_types_and_kinds_are_left_to_torch(chosen: list[str]) -> None:
    x, weight = torch.randn(64, 16), torch.randn(8, 16)
    linear(x.double(), weight.double())
    linear(torch.randn(0, 16), weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert not quick(torch.randn(64, 16, device="meta")) and quick(x)
    compiled = torch.compile(lambda a, b: linear(a, b), backend="eager")(x, weight)
    assert not chosen
    torch.testing.assert_close(compiled, linear(x, weight), **EXACT)
    with pytest.raises(RuntimeError):
        linear(x, weight.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [SHORTEST, SHORTEST + 37])
def test_causal_attention_and_its_gradients_are_those_of_float64(
    monkeypatch: pytest.MonkeyPatch, chosen: list[str], dtype: torch.dtype, kv_heads: int, length: int
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(causal, "SCORES", 40_000)  # several blocks, the last of which is smaller
    shapes = [(2, length, heads, 16) for heads in (4, kv_heads, kv_heads)]
    q, k, v = (torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes)
    grad = torch.randn(2, 4, length, 16).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    expected.backward(grad.double())
    got = attention(q, k, v, is_causal=True, enable_gqa=True)
    got.backward(grad)
    assert chosen.count("attention") == 1 and got.dtype == dtype
    theirs = [expected, *(t.grad for t in exact)]
    for mine, other in zip((got, q.grad, k.grad, v.grad), theirs, strict=True):
        assert mine is not None and mine.dtype == dtype
        off = (mine.double() - other).norm() / other.norm()
        # of bfloat16's 2^-9 of each number two or three add up; torch's own kernel is off by up to .01
        assert off < (1e-6 if dtype == torch.float32 else 5e-3), off


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_instructions_for_16_bits_all_of_it_is_float32(
    monkeypatch: pytest.MonkeyPatch, chosen: list[str], dtype: torch.dtype
) -> None:
    monkeypatch.setattr(half, "multiplies", lambda where, kind: kind in (torch.float32, torch.float64))
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, SHORTEST, 16).to(dtype) for heads in (4, 1, 1))
    got = attention(q, k, v, is_causal=True, enable_gqa=True)
    assert chosen.count("attention") == 1 and "product" in chosen and got.dtype == dtype
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)  # rounded once


@pytest.mark.parametrize("change", ["bias", "dropout", "short", "cached", "float64"])
def test_other_attention_is_left_to_torch(chosen: list[str], change: str) -> None:
    length = SHORTEST - 1 if change == "short" else SHORTEST
    dtype = torch.float64 if change == "float64" else torch.float32
    q, k = torch.randn(1, 2, length, 8, dtype=dtype), torch.randn(1, 2, length, 8, dtype=dtype)
    if change == "cached":
        q = q[:, :, :10]
    bias = torch.zeros(length, length) if change == "bias" else None
    attention(q, k, k, bias, is_causal=bias is None, dropout_p=0.1 if change == "dropout" else 0.0)
    assert "attention" not in chosen


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_network_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, chosen: list[str], checkpointing: bool
) -> None:
    """Log-probs and gradients of a network within float32's rounding of those of torch's own kernels."""
    size = {"vocab_size": 50, "d_model": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8}
    network = PaLMConfig(**size, activation_checkpointing=checkpointing).build()
    tokens = torch.randint(0, 50, (2, SHORTEST + 3))

    def results() -> list[Tensor]:
        network.zero_grad()
        out = network(tokens, head=TokenLogProbs(tokens, entropy=True))
        (out["logps"].mean() + out["entropy"].mean()).backward()
        return [out["logps"].detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]

    mine = results()
    assert {"product", "attention"} <= set(chosen)
    for module in (products, causal):
        monkeypatch.setattr(module, "multiplies_quickly", lambda: False)
    for got, expected in zip(mine, results(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_autocast_does_not_decide_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found out once, maybe under autocast, where torch's products of float32 have another type."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for found in (multiplies_quickly, packs):
        monkeypatch.setattr(products, found.__name__, found.__wrapped__)  # finds out again
    able = products.multiplies_quickly()
    assert able is torch.backends.mkldnn.is_available()
    with torch.autocast("cpu", torch.bfloat16):
        assert products.multiplies_quickly() is able
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not products.multiplies_quickly()
