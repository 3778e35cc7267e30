"""16-bit networks on a processor that does not multiply 16 bits: products are float32, results those of float64.

bfloat16 keeps 8 bits, so a rounded result is off by at most 2^-8 of its size; sums are float32 on either side.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_palm.models import PaLMConfig, TokenLogProbs
from lit_palm.models import half as half_module
from lit_palm.models.half import FEWEST, ROWS, attention, linear, widened

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(params=["converted", "native"])
def able(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whatever the processor of this test: without 16-bit products, and with them."""
    able = request.param == "native"
    monkeypatch.setattr(half_module, "multiplies", lambda where, dtype: able or dtype in (torch.float32, torch.float64))
    return able


@pytest.fixture
def unable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """A processor without 16-bit products; the types of what is multiplied."""
    monkeypatch.setattr(half_module, "multiplies", lambda where, dtype: dtype in (torch.float32, torch.float64))
    seen: list[torch.dtype] = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(word in str(func) for word in ("aten.mm", "addmm", "bmm", "attention")):
                seen.extend(t.dtype for t in args if isinstance(t, Tensor))
            return func(*args, **(kwargs or {}))

    with Products():
        yield seen


def close(got: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Rounded once: half a unit in the last place, and float32's own rounding of a sum near zero."""
    unit = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got.double(), exact, rtol=1.01 * unit, atol=1e-4)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", [FEWEST - 1, FEWEST, ROWS, 2 * ROWS + 3])
def test_products_and_their_gradients_are_rounded_once(able: bool, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    x, weight, grad = torch.randn(rows, 1, 40), torch.randn(30, 40), torch.randn(rows, 1, 30)
    x, weight, grad = (t.to(dtype) for t in (x, weight, grad))
    exact = [t.double().requires_grad_() for t in (x, weight)]
    expected = F.linear(*exact)
    expected.backward(grad.double())
    x.requires_grad_(), weight.requires_grad_()
    got = linear(x, weight)
    got.backward(grad)
    assert got.dtype == x.grad.dtype == weight.grad.dtype == dtype
    close(got, expected, dtype)
    close(x.grad, exact[0].grad, dtype)
    close(weight.grad, exact[1].grad, dtype)


def test_only_what_needs_a_gradient_gets_one(unable: list[torch.dtype]) -> None:
    x, weight = torch.randn(16, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    for needs in (x, weight):
        needs.requires_grad_()
        linear(x, weight).sum().backward()
        assert needs.grad is not None
        needs.requires_grad_(False).grad = None
        assert x.grad is None and weight.grad is None
    assert set(unable) == {torch.float32}


def test_between_products_tensors_stay_narrow(unable: list[torch.dtype]) -> None:
    kept: list[Tensor] = []
    x = torch.randn(16, 8).bfloat16().requires_grad_()
    weight = torch.randn(4, 8).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear(x, weight)
    assert kept and {t.dtype for t in kept} == {torch.bfloat16}


def test_autocast_rounds_both_factors_and_gives_gradients_in_their_own_type(able: bool) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(32, 40, requires_grad=True), torch.randn(30, 40, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear(x, weight)
    assert got.dtype is torch.bfloat16
    close(got, x.bfloat16().double() @ weight.bfloat16().double().T, torch.bfloat16)
    got.sum().backward()
    assert x.grad is not None and x.grad.dtype is torch.float32 and weight.grad is not None
    exact = x.bfloat16().double().sum(0).expand(30, 40)
    torch.testing.assert_close(weight.grad.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_is_that_of_float64(able: bool, kv_heads: int, biased: bool) -> None:
    torch.manual_seed(0)
    shapes = (2, 4, 20, 16), (2, kv_heads, 20, 16), (2, kv_heads, 20, 16)
    qkv = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    bias = torch.zeros(2, 1, 20, 20).masked_fill(torch.ones(20, 20).triu(1).bool(), -torch.inf) if biased else None
    options = {"is_causal": not biased, "enable_gqa": kv_heads == 1}
    exact = [t.detach().double().requires_grad_() for t in qkv]
    expected = F.scaled_dot_product_attention(*exact, None if bias is None else bias.double(), **options)
    got = attention(*qkv, None if bias is None else bias.bfloat16(), **options)
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=0.02, atol=0.02)
    got.float().square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in zip(qkv, exact, strict=True):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, rtol=0.05, atol=0.1)


def test_a_weight_is_widened_where_that_is_quicker(able: bool) -> None:
    weight = torch.randn(3, 4).bfloat16()
    assert widened(weight).dtype is (torch.bfloat16 if able else torch.float32)
    assert widened(weight.double()).dtype is torch.float64


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_no_product_of_a_training_step_is_native(unable: list[torch.dtype], precision: str) -> None:
    network = PaLMConfig(vocab_size=50, d_model=32, num_layers=2, num_heads=2, head_dim=16).build()
    if precision == "bf16-true":
        network.bfloat16()
    tokens = torch.randint(0, 50, (2, 16))
    for limit in (2**24, 50 * 4, 0):  # log-probabilities in one piece and in several, and logits
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
            head = TokenLogProbs(tokens, max_elements=limit) if limit else None
            result = network(tokens, head=head)
        (result["logps"] if limit else result).sum().backward()
    assert len(unable) > 20 and set(unable) == {torch.float32}


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_training_follows_float32(able: bool, precision: str) -> None:
    """Losses of 12 steps, about 3.9 nats a token at first, within 0.04 of those in float32."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 50, (4, 32))
    networks = [PaLMConfig(vocab_size=50, d_model=64, num_layers=2, num_heads=4, head_dim=16).build() for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    curves = []
    for network, low in zip(networks, (False, True), strict=True):
        if low and precision == "bf16-true":
            network.bfloat16()
        optimizer, curve = torch.optim.AdamW(network.parameters(), lr=3e-3), []
        for _ in range(12):
            with torch.autocast("cpu", torch.bfloat16) if low and precision == "bf16-mixed" else nullcontext():
                loss = -network(tokens, head=TokenLogProbs(tokens))["logps"].sum() / (4 * 31)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(float(loss.detach()))
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0] - 0.5
    torch.testing.assert_close(curves[1], curves[0], rtol=0, atol=0.04)
