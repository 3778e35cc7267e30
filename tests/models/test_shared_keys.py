"""Attention of heads that share keys, stacked into few products, gives what torch's kernel gives, and its gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.models import PaLMConfig, TokenLogProbs
from lit_palm.models import shared_keys as own
from lit_palm.models.half import attention


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the queries that were stacked."""
    seen: list[tuple[int, ...]] = []
    original = own._SharedAttention.apply

    def apply(*args: Any) -> Tensor:
        seen.append(tuple(args[0].shape))
        return original(*args)

    monkeypatch.setattr(own._SharedAttention, "apply", apply)
    return seen


def tensors(rows: int, heads: int, shared: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, width, h, 16) for h in (heads, shared, shared)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [t.transpose(1, 2).requires_grad_() for t in made]


@pytest.mark.parametrize("rows, heads, shared", [(1, 4, 1), (3, 8, 1), (9, 4, 1), (2, 8, 2)])
@pytest.mark.parametrize("width", [192, 209, 320])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_results_and_gradients_are_those_of_torch(
    rows: int, heads: int, shared: int, width: int, dtype: torch.dtype, calls: list[tuple[int, ...]]
) -> None:
    """The same sums in another order: 1e-10 in float64; in float32, of numbers up to 50 over rows of 300, 1e-4."""
    given = tensors(rows, heads, shared, width, dtype)
    got = attention(*given, is_causal=True, enable_gqa=shared != heads)
    assert calls == [(rows * shared, width, heads // shared, 16)]
    expected = F.scaled_dot_product_attention(*(t.double() for t in given), is_causal=True, enable_gqa=True)
    exact = {"rtol": 0, "atol": 1e-10 if dtype is torch.float64 else 1e-4}
    torch.testing.assert_close(got.double(), expected, **exact)
    above = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(got, given, above.to(dtype))
    wanted = torch.autograd.grad(expected, given, above)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype is dtype
        torch.testing.assert_close(one.double(), other.double(), **exact)


def test_what_is_better_left_to_torch(calls: list[tuple[int, ...]]) -> None:
    for heads, shared, width, options in (
        (4, 1, 191, {"is_causal": True}),
        (4, 2, 200, {"is_causal": True}),
        (4, 1, 200, {}),
        (4, 1, 200, {"is_causal": True, "dropout_p": 0.5}),
    ):
        attention(*tensors(1, heads, shared, width, torch.float32), enable_gqa=True, **options)
    given = [t.detach() for t in tensors(1, 4, 1, 200, torch.float32)]
    attention(*given, torch.zeros(200, 200), enable_gqa=True)
    with torch.autocast("cpu", torch.bfloat16):  # float32 in, products of 16 bits; widened where those are slow
        assert attention(*given, is_causal=True, enable_gqa=True).dtype is torch.bfloat16
    assert calls in ([], [(1, 200, 4, 16)])


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_network_gives_what_it_gives_under_a_mask(kv_heads: int, calls: list[tuple[int, ...]]) -> None:
    """A mask that hides nothing takes torch's kernel: log-probabilities and gradients to 1e-9, all in float64."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_layers": 2, "num_heads": 8, "head_dim": 8, "num_kv_heads": kv_heads}
    network = PaLMConfig(vocab_size=20, d_model=32, max_length=256, **fields).build().double()
    tokens, results = torch.randint(1, 20, (3, 230)), []
    for mask in (None, torch.ones_like(tokens, dtype=torch.bool)):
        logps = network(tokens, mask=mask, head=TokenLogProbs(tokens))["logps"]
        results.append([logps.detach(), *torch.autograd.grad(logps.sum(), list(network.parameters()))])
    assert calls == [(3 * kv_heads, 230, 8 // kv_heads, 8)] * 2
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
