"""Linear layers of somebody else's network, taken over, against the same layers in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lit_palm.models import half, products
from lit_palm.models.huggingface import HuggingFaceConfig
from lit_palm.models.layers import WITHOUT_GRADIENTS, QuickLinear
from lit_palm.models.products import native


class Own(nn.Linear):
    """A layer that is more than a linear one."""


def network(bias: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96, bias=bias), nn.GELU(), nn.Linear(96, 40, bias=bias), Own(40, 40))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2 * WITHOUT_GRADIENTS])
@pytest.mark.parametrize("autocast", [False, True])
def test_results_and_gradients(bias: bool, rows: int, autocast: bool) -> None:
    """float32 sums of up to 128 terms of about 1: 1e-5; bfloat16 rounds results, weights and gradients to 2**-8."""
    plain = network(bias)
    quick, wide = copy.deepcopy(plain), copy.deepcopy(plain).double()
    QuickLinear.take_over(quick)
    assert [type(layer) for layer in quick] == [QuickLinear, nn.GELU, QuickLinear, Own]
    assert list(quick.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, rows, 64)
    kind = x.device.type

    def results(made: nn.Module, x: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        with torch.autocast(kind, torch.bfloat16, enabled=autocast and x.dtype is torch.float32):
            y = made(x)
            with torch.no_grad():
                assert torch.allclose(made(x).double(), y.double(), atol=0.1 if autocast else 1e-5)
        (y.double() ** 2).mean().backward()
        gradients = [parameter.grad for parameter in made.parameters()]
        return [y, *(g for g in (x.grad, *gradients) if g is not None)]

    limit = 0.05 if autocast else 1e-5
    for found, expected in zip(results(quick, x), results(wide, x.double()), strict=True):
        assert found.dtype is torch.float32 or autocast
        torch.testing.assert_close(found.double(), expected, rtol=limit, atol=limit)


def test_many_rows_are_multiplied_by_our_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients from 8 rows on, without from as many as make up for packing the weight."""
    if not native(torch.float32):
        pytest.skip("matrix products are torch's here")
    quick, calls, multiply = network(True), [], products.multiply
    QuickLinear.take_over(quick)
    monkeypatch.setattr(products, "multiply", lambda *given: (calls.append(1), multiply(*given))[1])
    quick(torch.randn(products.FEWEST_ROWS - 1, 64))
    with torch.no_grad():
        quick(torch.randn(WITHOUT_GRADIENTS - 1, 64))
    assert not calls
    quick(torch.randn(products.FEWEST_ROWS, 64)).sum().backward()
    assert len(calls) == 5  # two forward; of the second layer two gradients, of the first the weight's
    with torch.no_grad():
        quick(torch.randn(WITHOUT_GRADIENTS, 64))
    assert len(calls) == 7


@pytest.mark.parametrize("bias", [True, False])
def test_sixteen_bits_without_instructions_for_them(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed in float32 and rounded, once for the product and once for the bias: 2**-7 of numbers up to 4."""
    monkeypatch.setattr(half, "multiplies", lambda x, dtype: dtype is torch.float32)
    quick = network(bias).bfloat16()
    wide = copy.deepcopy(quick).double()
    QuickLinear.take_over(quick)
    x = torch.randn(half.FEWEST, 64).bfloat16()
    made = quick[0](x)
    assert made.dtype is torch.bfloat16
    torch.testing.assert_close(made.double(), wide[0](x.double()), rtol=2**-7, atol=2**-7)


def test_a_network_of_transformers_has_them() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = HuggingFaceConfig(architecture={"model_type": "llama", **sizes}, vocab_size=40).build()
    kinds = {type(module) for module in made.lm.base_model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {QuickLinear}
