"""The decoding form against the network's own forward pass over whole sequences, in float64.

float32 log-probabilities agree to 2e-5 nats: sums of a few hundred terms, in another order. bfloat16 weights keep 8
bits and int8 ones 7, so that sums of rounded terms differ by up to 0.2 and 0.3 nats at these scales, whose logits are
of about 10; the products themselves are held to their rounding.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lit_palm.models import PaLM, PaLMConfig, matrices
from lit_palm.models import decoding as module
from lit_palm.models.decoding import Decoding, decoding_form
from lit_palm.models.decoding_step import run
from lit_palm.models.kernels import last_logits
from lit_palm.models.packed import packs
from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.sampling import Sampling, row_seeds

VOCAB = 61
KINDS: dict[str, dict[str, Any]] = {
    "multi-query": {},
    "grouped": {"num_kv_heads": 2},
    "multi-head": {"num_kv_heads": 4},
    "xpos": {"xpos": True},
    "l2": {"qk_norm": "l2", "num_kv_heads": 2},
    "layer": {"qk_norm": "layer"},
    "both": {"qk_norm": "layer", "xpos": True, "num_kv_heads": 2},
    "odd sizes": {"d_ffn": 51, "head_dim": 6, "d_model": 47, "num_heads": 3, "logit_scale": 0.1},
    "one block": {"num_layers": 1, "num_heads": 1, "head_dim": 2},
}


def build(dtype: torch.dtype = torch.float32, **changes: Any) -> PaLM:
    torch.manual_seed(0)
    fields = {"vocab_size": VOCAB, "d_model": 48, "num_layers": 3, "num_heads": 4, "head_dim": 8, "max_length": 64}
    network = PaLMConfig(**{**fields, **changes}).build().to(dtype).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if "norm" in name:  # ones would hide a weight that is left out
                weight.uniform_(0.5, 1.5)
    return network


@torch.no_grad()
def apart(network: PaLM, how: Decoding, rows: int, padded: bool, oracle: PaLM | None = None) -> float:
    """Largest difference of log-probabilities between decoding, step by step, and the oracle's whole sequences."""
    oracle = oracle or network
    tokens = torch.randint(0, VOCAB, (rows, 14))
    mask = torch.ones(rows, 6, dtype=torch.bool)
    if padded:
        mask = torch.arange(6)[None] >= torch.randint(0, 5, (rows, 1))
        mask[0] = True
    cache, decode, worst = network.new_cache(rows, 14), decoding_form(network, how), 0.0
    got = decode(tokens[:, :6], mask=mask if padded else None, cache=cache, head=last_logits)
    for place in range(6, 14):
        for row in range(rows):
            whole = torch.cat((tokens[row, :6][mask[row]], tokens[row, 6:place]))[None]
            expected = oracle(whole)[0, -1].double().log_softmax(-1)
            worst = max(worst, float((got[row].double().log_softmax(-1) - expected).abs().max()))
        got = decode(tokens[:, place : place + 1], cache=cache, head=last_logits)
    return worst


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tokens", [None, 3])
def test_a_step_is_the_network_s(kind: str, num_tokens: int | None) -> None:
    network = build(**KINDS[kind])
    wide = copy.deepcopy(network).double()
    for rows, padded in ((1, False), (3, True), (17, True)):
        assert apart(network, Decoding(num_tokens=num_tokens), rows, padded, wide) < 2e-5
    assert apart(wide, Decoding(num_tokens=num_tokens), 3, True) < 1e-12


@pytest.mark.parametrize("weights", [None, "bf16"])
@pytest.mark.parametrize("num_tokens", [None, 3])
def test_sixteen_bits(weights: Any, num_tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the processor does it, and as one with instructions for bfloat16 does."""
    network = build(torch.bfloat16 if weights is None else torch.float32, num_kv_heads=2)
    rounded = copy.deepcopy(network).bfloat16().double()
    for rows in (1, 3):
        assert apart(network, Decoding(weights, num_tokens=num_tokens), rows, True, rounded) < 0.2
    for name in (module, matrices):
        monkeypatch.setattr(name, "multiplies", lambda *_: True)
    for rows in (1, 3):
        assert apart(network, Decoding(weights, num_tokens=num_tokens), rows, True, rounded) < 0.2


@torch.no_grad()
def test_autocast_decodes_in_its_type() -> None:
    network = build()
    with torch.autocast(network.norm.weight.device.type, torch.bfloat16):
        assert 1e-5 < apart(network, Decoding(), 3, True) < 0.2
        decode = decoding_form(network, Decoding())
    assert decode is not network


def matrix_error(matrix: matrices.Matrix, weight: Tensor, rows: int) -> float:
    x, residual = torch.randn(rows, weight.shape[1]), torch.randn(rows, weight.shape[0])
    expected = residual.double() + x.double() @ weight.double().T
    return float((matrix.add(x, residual).double() - expected).abs().max())


@pytest.mark.parametrize("rows", [1, 2, 16, 33])
def test_matrices(rows: int) -> None:
    """Products of 40 terms of about 1: float32 rounds to 1e-5; a bfloat16 row of one is rounded itself, to 0.4%."""
    weight = torch.randn(30, 40)
    half = weight.bfloat16()
    assert matrix_error(matrices.Matrix(weight), weight, rows) < 2e-5
    assert matrix_error(matrices.HalfMatrix(half), half, rows) < (0.3 if rows == 1 else 2e-5)
    assert matrix_error(matrices.CastMatrix(half), half, rows) < 0.3
    parts = weight.split((10, 30), 1)
    if packs(torch.float32):
        assert matrix_error(matrices.FloatMatrix(parts), weight, rows) < 2e-5
        assert matrix_error(matrices.PackedMatrix(parts), weight, rows) < 2e-5
    if packs(torch.bfloat16):
        packed = matrices.PackedMatrix(half.split((10, 30), 1), torch.bfloat16)
        assert matrix_error(packed, half, rows) < 0.3
        x, residual = torch.randn(rows, 40).bfloat16(), torch.randn(rows, 30).bfloat16()
        expected = (residual.double() + x.double() @ half.double().T).float()  # rounded once, or twice on the way
        torch.testing.assert_close(packed.add(x, residual).float(), expected, rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_single_row_is_multiplied_by_all_threads(threads: int) -> None:
    """In parts, of which there are enough for all: 1e-5 as above."""
    if not packs(torch.float32):
        pytest.skip("this build of torch has no packed products")
    weight, usual = torch.randn(30, 40), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        matrix = matrices.FloatMatrix(weight.split((10, 30), 1))
        assert matrix_error(matrix, weight, 1) < 2e-5
    finally:
        torch.set_num_threads(usual)
    assert matrix.single is not None and len(matrix.single) == {1: 1, 2: 2, 3: 4}[threads]


@pytest.mark.parametrize("width", [40, 128])
def test_eight_bits(width: int) -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    weight = torch.randn(30, width)
    matrix = matrices.Int8Matrix(weight)
    step = weight.abs().amax(1) / 127  # symmetric, a scale for each output
    found = matrix(torch.eye(width)).T  # more rows than are read in 8 bits: float32
    assert ((found - weight).abs() <= 0.51 * step[:, None]).all() and (found - weight).abs().max() > 0.3 * step.min()
    assert matrix_error(matrix, found, 17) < 5e-5
    # bfloat16 activations, as in test_matrices; torch's kernel for them is for widths that 64 divides
    assert (matrix_error(matrix, found, 3) < 2e-5) is (width == 40)
    assert matrix_error(matrix, found, 3) < 0.4
    for rows in (3, 17):
        assert apart(build(), Decoding("int8"), rows, True) < 0.3


def test_eight_bits_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ValueError, match=r"int8.*pip install lit-palm\[int8\]"):
        decoding_form(build(), Decoding("int8"))


@torch.no_grad()
def test_compiled_steps_share_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever slot of the cache they write, and however many rows there are."""
    counter = CompileCounter()
    compiled = torch.compile(run, dynamic=True, backend=counter)
    monkeypatch.setattr(module, "compiled_run", lambda: compiled)
    network = build()
    decode = decoding_form(network, Decoding(compile=True))
    for rows in (2, 3):
        cache = network.new_cache(rows, 40)
        decode(torch.ones(rows, 5, dtype=torch.long), cache=cache, head=last_logits)
        for _ in range(15):
            decode(torch.ones(rows, 1, dtype=torch.long), cache=cache, head=last_logits)
    assert 1 <= counter.frame_count <= 2


class Listening(PaLM):
    """A network of somebody else's, whose forward pass is its own."""


def foreign(kind: str) -> PaLM:
    network = build()
    if kind == "subclass":
        network.__class__ = Listening
    elif kind == "hook":
        network.layers[1].register_forward_hook(lambda *_: None)
    elif kind == "patched":
        network.forward = network.forward  # type: ignore[method-assign]
    elif kind == "other layer":
        network.layers[0].attn_out = torch.nn.Linear(32, 48)
    else:
        network.layers[0].attn_out.bfloat16()
    return network


@pytest.mark.parametrize("kind", ["subclass", "hook", "patched", "other layer", "mixed types"])
def test_other_networks_decode_as_they_are(kind: str) -> None:
    network = foreign(kind)
    assert decoding_form(network, Decoding()) is network
    for how, name in ((Decoding("bf16"), "weights is bf16"), (Decoding(compile=True), "compile is True")):
        with pytest.raises(ValueError, match=f"engine.{name}.*leave"):
            decoding_form(network, how)


@pytest.mark.parametrize("engine", [CachedEngine(), ContinuousEngine(4)], ids=["cached", "continuous"])
@pytest.mark.parametrize("weights", [None, "bf16"])
def test_weights_of_now_and_no_copy_left(engine: Any, weights: Any) -> None:
    def copies() -> list[Any]:
        gc.collect()
        return [thing for thing in gc.get_objects() if type(thing).__module__ == matrices.__name__]

    others = len(copies())  # of a server that another test has left running
    engine.weights = weights
    network, prompts = build(), list(torch.randint(2, VOCAB, (6, 5)))
    sampling, seeds = Sampling(max_new_tokens=40), row_seeds(0, 0, torch.arange(6))

    def sampled() -> list[list[int]]:
        got = engine.generate(network, prompts, sampling, seeds, pad_id=0, eos_id=None)
        return [ids.tolist() for ids in got.completions]

    before = sampled()
    assert sampled() == before
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.3)
    after = sampled()
    assert after != before
    fresh = PaLM(network.config).eval()
    fresh.load_state_dict(network.state_dict())
    network = fresh
    assert sampled() == after
    assert len(copies()) == others
