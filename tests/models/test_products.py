"""Large products of a processor against torch's in float64.

They are taken on processors with AVX-512 alone. Here they run on any: what decides is replaced, and where this build of
torch has no such product, so is the product itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.models import PaLMConfig, TokenLogProbs, products
from lit_palm.models.half import linear
from lit_palm.models.products import FEWEST_ROWS, PIECE, multiplies_quickly, packs, product, quick, weight_gradient

# float32 keeps 24 bits; sums of n numbers are off by some sqrt(n) units in the last place of the largest of them
EXACT = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A processor on which they are quicker; which were taken."""
    taken: list[str] = []
    multiply = products._product
    if not torch.backends.mkldnn.is_available():
        multiply = F.linear

    def counted(x: Tensor, weight: Tensor) -> Tensor:
        taken.append("product")
        return multiply(x, weight)

    monkeypatch.setattr(products, "multiplies_quickly", lambda: True)
    monkeypatch.setattr(products, "_product", counted)
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_network_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, chosen: list[str], checkpointing: bool
) -> None:
    """Log-probs and gradients of a network within float32's rounding of those of torch's own kernels."""
    size = {"vocab_size": 50, "d_model": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8}
    network = PaLMConfig(**size, activation_checkpointing=checkpointing).build()
    tokens = torch.randint(0, 50, (2, 259))

    def results() -> list[Tensor]:
        network.zero_grad()
        out = network(tokens, head=TokenLogProbs(tokens, entropy=True))
        (out["logps"].mean() + out["entropy"].mean()).backward()
        return [out["logps"].detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]

    mine = results()
    assert "product" in chosen
    monkeypatch.setattr(products, "multiplies_quickly", lambda: False)
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
