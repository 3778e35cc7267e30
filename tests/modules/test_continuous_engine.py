"""PPO whose rollouts come from the continuous-batching engine: the same collections, the same training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.rollout.engine import CachedEngine
from tests.support import apart, policy, prompt_data, recorded, trainer, weights


def test_ppo_is_the_same_with_either_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    runs = []
    for engine in (CachedEngine(), ContinuousEngine(max_batch_size=3)):
        module = policy(engine=engine)
        with recorded(module) as batches:
            trainer(tmp_path, max_steps=4).fit(module, datamodule=prompt_data(tmp_path))
        assert module.engine_agrees  # its log-probabilities are those of training
        runs.append((batches, weights(module)))
    (batches, one), (others, other) = runs
    assert len(batches) == len(others) == 4
    assert all(torch.equal(a, b) for a, b in zip(batches, others, strict=True))
    # log-probabilities and so gradients differ in their last bits, which AdamW's first steps enlarge
    assert apart(one, other) < 1e-3
