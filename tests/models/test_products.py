"""Compiled products of a processor against torch's in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.models import PaLMConfig, TokenLogProbs, packed, products
from lit_palm.models.half import linear
from lit_palm.models.packed import multiplies_quickly, packs
from lit_palm.models.products import FEWEST_ROWS, Panels, native, product, quick, weight_gradient

TYPES = [
    pytest.param(
        dtype, marks=pytest.mark.skipif(not native(dtype), reason=f"no compiled products of {dtype} on this processor")
    )
    for dtype in (torch.float32, torch.bfloat16)
]
# Shares of the largest number of a result. float32 keeps 24 bits, and sums of n numbers are off by some sqrt(n) units
# in the last place; bfloat16 keeps 8 bits, of which half a unit is lost when a result is rounded
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-8}


def assert_near(got: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    assert got is not None and expected is not None and got.shape == expected.shape
    off = (got.double() - expected).abs().max() / expected.abs().max()
    assert off.item() < TOLERANCE[dtype]


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.dtype]]:
    """Types of the results of those that were taken."""
    taken: list[torch.dtype] = []
    multiply = products.multiply

    def counted(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        taken.append(dtype)
        return multiply(a, b, dtype)

    monkeypatch.setattr(products, "multiply", counted)
    yield taken


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (FEWEST_ROWS - 1, 40, 34),
        (FEWEST_ROWS, 34, 40),
        (100, 64, 130),
        (97, 2300, 32),  # sums in several parts
        (4301, 38, 70),  # of which those over rows have an odd one
        (13, 32, 1030),
    ],
)
def test_products_and_their_gradients_are_those_of_float64(
    chosen: list[torch.dtype], dtype: torch.dtype, mixed: bool, rows: int, inputs: int, outputs: int
) -> None:
    """With weights of the products' type, and float32 ones, of which autocast makes that: their gradient is float32."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 1, inputs), torch.randn(outputs, inputs)
    x, weight = x.to(dtype).requires_grad_(), (weight if mixed else weight.to(dtype)).requires_grad_()
    grad = torch.randn(rows, 1, outputs).to(dtype)
    exact = [t.detach().to(dtype).double().requires_grad_() for t in (x, weight)]
    expected = F.linear(*exact)
    expected.backward(grad.double())
    with torch.autocast("cpu", dtype if dtype is torch.bfloat16 else None, enabled=mixed and dtype is torch.bfloat16):
        got = linear(x, weight)
    got.backward(grad)
    assert chosen == ([dtype, dtype, torch.float32] if rows >= FEWEST_ROWS else [])
    assert got.dtype is dtype and weight.grad is not None and weight.grad.is_contiguous()
    assert_near(got, expected, dtype)
    assert_near(x.grad, exact[0].grad, dtype)
    assert_near(weight.grad, exact[1].grad, weight.dtype if chosen else dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_factors_may_lie_in_memory_as_they_like(dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype)

    lefts = (
        drawn(64, 36), drawn(64, 72)[:, ::2], drawn(36, 64).t(), drawn(128, 36)[::2], drawn(64, 100)[:, 1:37],
        drawn(64, 101)[:, :36], drawn(64 * 36 + 1)[1:].view(64, 36), drawn(1, 36).expand(64, 36),
    )  # fmt: skip
    rights = drawn(40, 36), drawn(36, 40).t(), drawn(80, 36)[::2], drawn(40, 72)[:, ::2], drawn(40, 37)[:, 1:]
    for x in lefts:
        for weight in rights:
            assert_near(product(x, weight), x.double() @ weight.double().t(), dtype)
    for grad in (drawn(64, 40), drawn(64, 80)[:, ::2], drawn(40, 64).t(), drawn(1, 40).expand(64, 40)):
        for x in lefts:
            assert_near(weight_gradient(grad, x), grad.double().t() @ x.double(), torch.float32)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_needs_no_gradient_gets_none_and_one_number_may_be_that_of_all(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    factors = torch.randn(64, 36).to(dtype), torch.randn(40, 36).to(dtype)
    for which in (0, 1):
        mine, exact = [t.clone() for t in factors], [t.double() for t in factors]
        mine[which].requires_grad_(), exact[which].requires_grad_()
        linear(*mine).sum().backward()
        F.linear(*exact).sum().backward()
        assert_near(mine[which].grad, exact[which].grad, dtype)
        assert mine[1 - which].grad is None


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_depends_on_nothing_but_itself(dtype: torch.dtype) -> None:
    """Bit by bit: not on other rows, nor on how many threads there are."""
    torch.manual_seed(0)
    x, weight, threads = torch.randn(200, 1100).to(dtype), torch.randn(130, 1100).to(dtype), torch.get_num_threads()
    whole = product(x, weight)
    for part in (slice(0, 8), slice(3, 14), slice(100, 197)):
        assert torch.equal(product(x[part], weight), whole[part])
    gradient = weight_gradient(whole, x)
    try:
        torch.set_num_threads(3)
        assert torch.equal(product(x, weight), whole) and torch.equal(weight_gradient(whole, x), gradient)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 64, 130])
@pytest.mark.parametrize(("inputs", "outputs"), [(34, 70), (2300, 64), (64, 1)])
def test_packed_weights_multiply_few_rows(dtype: torch.dtype, wide: bool, rows: int, inputs: int, outputs: int) -> None:
    """Of the weight's type and in float32, of which only the factors are rounded; a residual is added in float32."""
    torch.manual_seed(0)
    weight, kind = torch.randn(outputs, inputs), torch.float32 if wide else dtype
    x, residual = torch.randn(inputs, rows).to(kind).t(), torch.randn(rows, 2 * outputs).to(kind)[:, ::2]
    panels = Panels(weight if wide else weight.to(dtype), dtype)
    expected = x.to(dtype).double() @ weight.to(dtype).double().t()
    assert_near(panels.product(x), expected, kind)
    assert_near(panels.product(x, residual), expected + residual.double(), kind)
    assert panels.product(x).dtype is kind


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("columns", [(0, 300), (0, 1), (64, 128), (96, 200), (104, 105), (288, 300)])
def test_some_columns_are_those_of_the_whole(dtype: torch.dtype, columns: tuple[int, int]) -> None:
    """Bit by bit, wherever they lie in a panel."""
    weight, x = torch.randn(300, 96).to(dtype), torch.randn(130, 96).to(dtype)
    panels, (first, last) = Panels(weight, dtype), columns
    assert torch.equal(panels.product(x, columns=columns), panels.product(x)[:, first:last])


@pytest.mark.parametrize("dtype", TYPES)
def test_numbers_that_are_none_are_kept(dtype: torch.dtype) -> None:
    """Infinity and NaN reach their own row and no other, also where a tile goes beyond the last row."""
    x, weight = torch.ones(9, 34).to(dtype), torch.ones(33, 34).to(dtype)
    x[2, 33], x[8, 0] = float("inf"), float("nan")
    got = product(x, weight if dtype is torch.float32 else weight[:32])
    assert got[2].isinf().all() and got[8].isnan().all()
    assert torch.equal(got[[0, 1, 3, 4, 5, 6, 7]], torch.full((7, got.shape[1]), 34.0, dtype=dtype))


def test_other_types_and_kinds_are_left_to_torch(chosen: list[torch.dtype]) -> None:
    x, weight = torch.randn(64, 32), torch.randn(40, 32)
    linear(x.double(), weight.double())
    linear(torch.randn(0, 32), weight)
    linear(x, weight[:1])  # the head of a value network
    with torch.autocast("cpu", torch.float16):
        assert linear(x, weight).dtype == torch.float16
    odd = torch.randn(64, 33).bfloat16(), torch.randn(40, 33).bfloat16()
    torch.testing.assert_close(linear(*odd), F.linear(*odd))
    assert not quick(torch.randn(64, 32, device="meta"), weight, torch.float32)
    compiled = torch.compile(lambda a, b: linear(a, b), backend="eager")(x, weight)
    assert not chosen
    torch.testing.assert_close(compiled, linear(x, weight), rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError):
        linear(x, weight.double())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_whole_network_gives_the_same(
    monkeypatch: pytest.MonkeyPatch, chosen: list[torch.dtype], checkpointing: bool, dtype: torch.dtype
) -> None:
    """Log-probs and gradients within rounding of those of torch's own kernels; under autocast both round alike."""
    size = {"vocab_size": 50, "d_model": 32, "num_layers": 2, "num_heads": 4, "head_dim": 8}
    network = PaLMConfig(**size, activation_checkpointing=checkpointing).build()
    tokens = torch.randint(0, 50, (2, 259))

    def results() -> list[Tensor]:
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = network(tokens, head=TokenLogProbs(tokens, entropy=True))
            (out["logps"].mean() + out["entropy"].mean()).backward()
        return [out["logps"].detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]

    mine = results()
    assert dtype in chosen
    monkeypatch.setattr(products, "native", lambda dtype: False)
    # a number of 8 bits here and there falls to the other side: shares of the largest one, layer upon layer
    scale = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    for got, expected in zip(mine, results(), strict=True):
        assert float((got - expected).abs().max() / expected.abs().max()) < scale


def test_autocast_does_not_decide_what_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found out once, maybe under autocast, where torch's products of float32 have another type."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for found in (multiplies_quickly, packs):
        monkeypatch.setattr(packed, found.__name__, found.__wrapped__)  # finds out again
    able = packed.multiplies_quickly()
    assert able is torch.backends.mkldnn.is_available()
    with torch.autocast("cpu", torch.bfloat16):
        assert packed.multiplies_quickly() is able
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not packed.multiplies_quickly()
