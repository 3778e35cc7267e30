"""Our engines, what decoding would take at the machine's read bandwidth, and mixed lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_palm.models import PaLM
from lit_palm.models.decoding import Decoding, decoding_form
from lit_palm.models.hardware import measure_peak_bandwidth
from lit_palm.models.kernels import last_logits
from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.rollout.engine import CachedEngine, Engine
from lit_palm.rollout.sampling import Sampling, row_seeds
from tests.benchmarks.inputs import Size, dtype_of, parameters, token_ids
from tests.benchmarks.ours.running import config
from tests.benchmarks.worker import Work

HOST = torch.Generator().device
ENGINES: dict[str, type[CachedEngine] | type[ContinuousEngine]] = {
    "cached": CachedEngine,
    "continuous": ContinuousEngine,
}


def build(size: Size, precision: str = "32-true") -> PaLM:
    """The network, not in training."""
    torch.manual_seed(0)
    return config(size).build().to(dtype_of(precision)).eval()


def sample(
    network: PaLM,
    engine: Engine,
    prompts: Sequence[Tensor],
    sampling: Sampling,
    first: int = 0,
    eos_id: int | None = None,
) -> list[int]:
    """The lengths of one completion a prompt; row r has the seed of row `first + r`."""
    seeds = row_seeds(0, 0, torch.arange(first, first + len(prompts)))
    made = engine.generate(network, list(prompts), sampling, seeds, pad_id=0, eos_id=eos_id)
    return [len(completion) for completion in made.completions]


def generate(
    size: dict[str, int], rows: int, prompt: int, new: int, precision: str, completions: int = 1,
    engine: str = "cached", **options: Any,
) -> Work:  # fmt: skip
    """New tokens at temperature 1, no filter, no end.

    Args:
        size: the network.
        rows: prompts.
        prompt: ids of a prompt.
        new: ids of a completion.
        precision: `32-true` or `bf16-true`.
        completions: of each prompt.
        engine: `cached` or `continuous`.
        options: of the engine.
    """
    network = build(Size(**size), precision)
    prompts = [row for row in token_ids(0, rows, prompt) for _ in range(completions)]
    sampling, chosen = Sampling(max_new_tokens=new), ENGINES[engine](**options)

    def run() -> dict[str, Any]:
        return {"tokens": sum(sample(network, chosen, prompts, sampling))}

    return run


def bandwidth_bound(size: dict[str, int], new: int, precision: str, num_bytes: int = 2**28) -> Work:
    """The seconds that reading all weights once a token would take at the read bandwidth measured here, now."""
    weights = parameters(Size(**size)) * dtype_of(precision).itemsize

    def run() -> dict[str, Any]:
        peak = measure_peak_bandwidth(HOST, num_bytes)
        return {"cost": new * weights / peak, "tokens": new, "peak_bandwidth": peak}

    return run


def mixed(size: dict[str, int], prompts: int, prompt: int, mean: int, longest: int, rows: int, way: str) -> Work:
    """Completions of geometric lengths, cut at a maximum; the same ones, of the same prompts and seeds, either way.

    The network has as many ids as the mean length, and so high a temperature that each is as likely as any other; one
    of them ends a completion.

    Args:
        size: the network; its vocabulary is replaced.
        prompts: how many.
        prompt: ids of each.
        mean: of the geometric distribution.
        longest: completion.
        rows: at once, of a batch too.
        way: `continuous`: a prompt starts as soon as a row is free. `static`: batches whose rows all run until the
            longest has ended. `cached`: the built-in engine, which runs such batches but drops finished rows when they
            are half of it.
    """
    network = build(Size(**{**size, "vocab_size": mean}))
    ids = list(token_ids(0, prompts, prompt, mean))
    sampling = Sampling(max_new_tokens=longest, temperature=50.0)
    lengths = sample(network, ContinuousEngine(rows), ids, sampling, eos_id=1)

    def run() -> dict[str, Any]:
        if way == "continuous":
            made = sample(network, ContinuousEngine(rows), ids, sampling, eos_id=1)
        elif way == "cached":
            made = sample(network, CachedEngine(rows), ids, sampling, eos_id=1)
        else:
            for start in range(0, prompts, rows):
                part = slice(start, start + rows)
                until = Sampling(max_new_tokens=max(lengths[part]), temperature=50.0)
                sample(network, CachedEngine(), ids[part], until, start)
            made = lengths
        return {"tokens": sum(made), "longest": max(made)}

    return run


def decode_at(size: dict[str, int], position: int, steps: int) -> Work:
    """Decoding steps of one row near a position of the cache."""
    network = build(Size(**size))
    decode, cache = decoding_form(network, Decoding()), network.new_cache(1, position + steps)
    token = torch.ones(1, 1, dtype=torch.long)
    with torch.no_grad():
        decode(token_ids(0, 1, position), cache=cache, head=last_logits)

    @torch.no_grad()
    def run() -> dict[str, Any]:
        cache.length = position  # the same slots again and again
        for _ in range(steps):
            decode(token, cache=cache, head=last_logits)
        return {"tokens": steps}

    return run
