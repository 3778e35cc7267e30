"""Continuous batching over caches of Hugging Face networks: rotary, learned and ALiBi positions, sliding windows."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from lit_palm.models.base import Network
from lit_palm.modules.weights import load_network
from lit_palm.rollout.continuous import Scheduler
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.requests import Handle
from lit_palm.rollout.sampling import Sampling
from tests.families import FAMILIES, write_family

PAD, EOS = 0, 1


@pytest.mark.parametrize("family", FAMILIES)
def test_arrivals_get_the_tokens_they_would_get_alone(tmp_path: Path, family: str) -> None:
    network = load_network(write_family(tmp_path, family))
    assert isinstance(network.eval(), Network)
    chance, handles = random.Random(0), []
    running = Scheduler(network, pad_id=PAD, eos_id=EOS, max_batch_size=5, prefill_tokens=16)
    left = 16
    while left or running.busy:
        while left and chance.random() < 0.3:
            prompt = [chance.randrange(2, 320) for _ in range(chance.choice([1, 3, 12, 40]))]
            sampling = Sampling(temperature=chance.choice([0.0, 0.8]), max_new_tokens=chance.randint(2, 24))
            handles.append(running.submit(prompt, sampling, chance.randrange(2**40)))
            left -= 1
        if handles and chance.random() < 0.03:
            running.cancel(chance.choice(handles))
        running.step()
    finished = [handle for handle in handles if handle.finish_reason != "cancelled"]
    assert len(finished) > 10
    assert all(handle.tokens == alone(network, handle) for handle in finished)


def alone(network: Network, handle: Handle) -> list[int]:
    got = CachedEngine().generate(
        network,
        [torch.tensor(handle.prompt)],
        handle.sampling,
        torch.tensor([handle.seed]),
        pad_id=PAD,
        eos_id=EOS,
    )
    return got.completions[0].tolist()
