"""Engines agree: on tokens whatever the batching, on log-probabilities with a plain forward pass in float32.

Tokens agree for at least 99.9% of rows, not for all: a product's sums are taken in another order for another number of
rows, and a uniform number that lies within that rounding of the border between two tokens falls to the other side.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_palm.models import PaLM, PaLMConfig
from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.rollout.engine import CachedEngine, Engine, Generation
from lit_palm.rollout.sampling import Sampling, row_seeds

VOCAB, EOS, PAD = 60, 1, 0


@pytest.fixture(scope="module")
def network() -> PaLM:
    torch.manual_seed(0)
    fields: dict[str, Any] = {"num_layers": 2, "num_heads": 4, "head_dim": 16, "num_kv_heads": 2, "logit_scale": 0.3}
    made = PaLMConfig(vocab_size=VOCAB, d_model=64, max_length=64, **fields).build().eval()
    with torch.no_grad():
        made.embedding.weight.mul_(0.3)  # else a tied embedding of N(0, 1) repeats the last token for ever
    return made


def prompts(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 13, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCAB, (n,), generator=generator) for n in lengths]


def generated(network: PaLM, engine: Engine, count: int, **options: Any) -> Generation:
    sampling, seeds = Sampling(**{"max_new_tokens": 10, **options}), row_seeds(3, 0, torch.arange(count))
    return engine.generate(network, prompts(count), sampling, seeds, pad_id=PAD, eos_id=EOS)


def test_tokens_are_the_same_whatever_the_batching(network: PaLM) -> None:
    count = 240
    engines = [CachedEngine(1), *(make(size) for make in (CachedEngine, ContinuousEngine) for size in (7, 64))]
    runs = [[ids.tolist() for ids in generated(network, engine, count).completions] for engine in engines]
    assert len({len(row) for row in runs[0]}) > 5 and len(set(map(tuple, runs[0]))) > 180
    same = sum(one == other for run in runs[1:] for one, other in zip(runs[0], run, strict=True))
    assert same >= 0.999 * count * (len(runs) - 1)


@torch.no_grad()
def differences(network: PaLM, oracle: PaLM, engine: Engine, count: int = 40) -> Tensor:
    """Of each sampled token's log-probability from that in a forward pass over the whole row, without any cache."""
    got, apart = generated(network, engine, count), []
    for prompt, ids, logps in zip(prompts(count), got.completions, got.logps, strict=True):
        logits = oracle(torch.cat((prompt, ids))[None])[0, len(prompt) - 1 : -1]
        expected = logits.double().log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
        apart.append((logps - expected).abs())
    return torch.cat(apart)


MAKES: dict[str, Callable[..., Engine]] = {
    "cached": lambda **options: CachedEngine(9, **options),
    "continuous": lambda **options: ContinuousEngine(9, **options),
}


@pytest.mark.parametrize("make", MAKES)
def test_log_probabilities_of_float32_and_bfloat16_weights(network: PaLM, make: str) -> None:
    """float32 rounds to 2e-5 nats; weights of 8 bits move these, over logits of size 2, by 0.06, 0.01 on average."""
    assert differences(network, network, MAKES[make]()).max() < 2e-5
    apart = differences(network, network, MAKES[make](weights="bf16"))
    assert 1e-4 < apart.max() < 0.06 and apart.mean() < 0.01


@pytest.mark.parametrize("make", MAKES)
def test_log_probabilities_of_eight_bits(network: PaLM, make: str) -> None:
    """A scale an output and 7 bits below it: 0.1 nats at most, 0.015 on average."""
    pytest.importorskip("torchao")
    apart = differences(network, network, MAKES[make](weights="int8"))
    assert 1e-4 < apart.max() < 0.1 and apart.mean() < 0.015


def compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return bool(get_cpp_compiler())
    except Exception:
        return False


@pytest.mark.skipif(not compiler(), reason="no C++ compiler")
def test_log_probabilities_of_a_compiled_continuous_bfloat16_rollout(network: PaLM) -> None:
    """Within 0.06 nats (mean 0.01) of the plain float32 forward pass, as without compilation."""
    engine = ContinuousEngine(9, weights="bf16", compile=True)
    apart = differences(network, network, engine)
    assert 1e-4 < apart.max() < 0.06 and apart.mean() < 0.01


def test_without_a_compiler_there_is_one_clear_error(network: PaLM) -> None:
    program = (
        "from lit_palm.models import PaLMConfig\n"
        "from lit_palm.models.decoding import Decoding, decoding_form\n"
        "network = PaLMConfig(vocab_size=9, d_model=16, num_layers=1, num_heads=1).build().eval()\n"
        "try:\n    decoding_form(network, Decoding(compile=True))\n"
        "except ValueError as error:\n    print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, "CXX": "/nonexistent"}
    )
    assert "engine.compile: torch.compile needs a C++ compiler and finds none" in found.stdout, found.stderr
    assert "leave engine.compile out" in found.stdout
