"""The compiled step beside torch's operations, and what happens without a compiler.

float32 log-probabilities agree with float64 whole sequences to 2e-5 nats and bfloat16 ones to 0.2, as in test_decoding;
the step itself is held to the rounding of its type, with terms of about 1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm import native
from lit_palm.models.decoding import Decoding, decoding_form
from lit_palm.models.decoding_native import SOURCE, NativeStep
from lit_palm.models.hardware import multiplies
from lit_palm.models.layers import rotate
from lit_palm.models.products import native as native_product
from lit_palm.native import compiled, find_compiler
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.sampling import Sampling, row_seeds
from tests.models.test_decoding import VOCAB, apart, build

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
SHAPES = [(8, 1, 32), (6, 3, 32), (2, 2, 64), (4, 1, 64), (8, 2, 128), (3, 1, 256), (16, 1, 64)]


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was compiled is looked for again, before and after."""
    compiled.cache_clear()
    yield
    compiled.cache_clear()


def by_torch(
    fused: Tensor, rope: list[Tensor], bias: Tensor | None, keys: Tensor, values: Tensor, start: int, place: int,
    heads: int,
) -> Tensor:  # fmt: skip
    """The same in float64, keys and values of the token stored by the way."""
    rows, kv_heads, _, head_dim = keys.shape
    qk, v, rest = fused.split(
        ((heads + kv_heads) * head_dim, kv_heads * head_dim, fused.shape[1] - (heads + 2 * kv_heads) * head_dim), 1
    )
    (rotated,) = rotate(qk.view(rows, -1, head_dim), rope)
    q, k = rotated.split((heads, kv_heads), 1)
    keys[:, :, place], values[:, :, place] = k, v.view(rows, kv_heads, head_dim)
    seen = [t[:, :, start : place + 1].double().repeat_interleave(heads // kv_heads, 1) for t in (keys, values)]
    scores = q[:, :, None].double() @ seen[0].mT / head_dim**0.5  # torch's own attention gives 0 for NaN
    attended = (scores if bias is None else scores + bias[:, None, None]).softmax(-1) @ seen[1]
    gate, up = rest.double().chunk(2, 1)
    return torch.cat((attended.flatten(1), F.silu(gate) * up), 1)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_step_is_torch_s(shape: tuple[int, int, int], dtype: torch.dtype, threads: int) -> None:
    """float32 sums of 32 to 256 terms: 1e-5; bfloat16 results are rounded once: 2**-8 of them."""
    heads, kv_heads, head_dim = shape
    step = NativeStep.of(dtype, heads, kv_heads, head_dim, 96)
    assert step is not None
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, start, place, padded in ((1, 0, 0, False), (3, 2, 21, True), (17, 5, 70, True), (2, 0, 33, False)):
            torch.manual_seed(place)
            fused = torch.randn(rows, (heads + 2 * kv_heads) * head_dim + 2 * 96).to(dtype)
            keys, values = (torch.randn(rows, kv_heads, 80, head_dim).to(dtype) for _ in range(2))
            rope = [torch.randn(rows if padded else 1, 1, head_dim) for _ in range(2)]
            bias = None
            if padded:
                bias = torch.zeros(rows, 80, dtype=dtype)[:, start : place + 1]
                bias[0, :9] = -torch.inf
            wanted, stored = (keys.clone(), values.clone()), (keys.clone(), values.clone())
            expected = by_torch(fused, rope, bias, *wanted, start, place, heads)
            run = step.begin(torch.empty(rows, 1, dtype=dtype), rope, bias, start, place)
            found = run(fused, *stored)
            limit = 1e-5 if dtype is torch.float32 else 2**-7
            torch.testing.assert_close(found.double(), expected, atol=limit, rtol=limit)
            for mine, theirs in zip(stored, wanted, strict=True):  # a fused multiplication rounds once less
                torch.testing.assert_close(mine, theirs)
            torch.testing.assert_close(run(fused, *stored), found, rtol=0, atol=0)
    finally:
        torch.set_num_threads(usual)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e4, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_out_of_range_come_out_as_torch_s(value: float, dtype: torch.dtype) -> None:
    """Nothing that is not a number is lost on the way, and nothing else becomes one."""
    step = NativeStep.of(dtype, 2, 1, 32, 32)
    assert step is not None
    for place in (3, 40, 100, 150, 190):  # of a query, the key, the value, the gate, the up projection
        fused = torch.randn(1, 192).to(dtype)
        fused[0, place] = value
        keys, values = (torch.randn(1, 1, 8, 32).to(dtype) for _ in range(2))
        rope = [torch.ones(1, 1, 32), torch.zeros(1, 1, 32)]
        expected = by_torch(fused, rope, None, keys.clone(), values.clone(), 0, 5, 2)
        found = step.begin(fused, rope, None, 0, 5)(fused, keys, values)
        assert torch.equal(found.isfinite(), expected.to(dtype).isfinite()), place


KINDS: list[dict[str, Any]] = [
    {"head_dim": 32, "d_ffn": 64},
    {"head_dim": 32, "num_heads": 6, "num_kv_heads": 3, "d_ffn": 32},
    {"head_dim": 64, "num_kv_heads": 4},
    {"head_dim": 128, "num_heads": 2},
    {"head_dim": 256, "num_heads": 1, "d_ffn": 96},
]


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [None, 3])
def test_decoding_is_the_network_s(kind: dict[str, Any], num_tokens: int | None) -> None:
    """Weights packed and as they are, one row and several, padded and not, in both types."""
    network = build(**kind)
    form: Any = decoding_form(network, Decoding(num_tokens=num_tokens))
    assert form.native is not None
    wide = copy.deepcopy(network).double()
    for rows, padded in ((1, False), (3, True), (17, True)):
        assert apart(network, Decoding(num_tokens=num_tokens), rows, padded, wide) < 2e-5
    half = copy.deepcopy(network).bfloat16()
    assert apart(half, Decoding(num_tokens=num_tokens), 3, True, copy.deepcopy(half).double()) < 0.2


@pytest.mark.skipif(not native_product(torch.float32), reason="matrix products are torch's")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_all_blocks_in_one_call(kind: dict[str, Any], rows: int) -> None:
    """In both types, and with weights rounded to bfloat16 under autocast; of 100 rows threads take some each."""
    network = build(d_model=64, **kind)
    form: Any = decoding_form(network, Decoding())
    assert form.whole is not None and form.reads
    assert apart(network, Decoding(), rows, rows > 1, copy.deepcopy(network).double()) < 2e-5
    if native_product(torch.bfloat16):
        half = copy.deepcopy(network).bfloat16()
        rounded = copy.deepcopy(half).double()
        assert apart(half, Decoding(), rows, rows > 1, rounded) < 0.2
        with torch.autocast(network.norm.weight.device.type, torch.bfloat16):
            assert decoding_form(network, Decoding()).whole.product is torch.bfloat16  # type: ignore[attr-defined]
            assert 1e-5 < apart(network, Decoding(), rows, rows > 1) < 0.2
        assert 1e-5 < apart(network, Decoding("bf16"), rows, rows > 1, rounded) < 0.2


@pytest.mark.parametrize("kind", [{"xpos": True}, {"qk_norm": "l2"}, {"head_dim": 8}, {"d_ffn": 50}])
def test_other_shapes_go_on_without_it(kind: dict[str, Any]) -> None:
    form: Any = decoding_form(build(**{"head_dim": 32, "d_ffn": 64, **kind}), Decoding())
    assert form.native is None


def sampled(dtype: torch.dtype) -> list[list[int]]:
    network = build(dtype, head_dim=32, d_ffn=64)
    prompts = [torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(n)) for n in range(2, 10)]
    got = CachedEngine().generate(
        network, prompts, Sampling(max_new_tokens=30), row_seeds(0, 0, torch.arange(8)), pad_id=0, eos_id=1
    )
    return [ids.tolist() for ids in got.completions]


@needs_compiler
@pytest.mark.usefixtures("forgotten")
def test_the_same_tokens_with_a_compiler_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32; rounding decides of a token in some thousands. In bfloat16 it would of one in a hundred."""
    with_it = sampled(torch.float32)
    monkeypatch.setattr(native, "find_compiler", lambda: None)
    compiled.cache_clear()
    assert compiled(SOURCE) is None
    assert sampled(torch.float32) == with_it


def test_bfloat16_is_native_where_the_processor_multiplies_it() -> None:
    form: Any = decoding_form(build(torch.bfloat16, head_dim=32, d_ffn=64), Decoding())
    assert form.dtype is (torch.bfloat16 if multiplies(torch.empty(0), torch.bfloat16) else torch.float32)
