"""What a run says and logs of its engine and the weights that this decodes with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lit_palm.models.hardware import multiplies
from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.rollout.engine import CachedEngine
from lit_palm.timing import Stopwatch, span
from tests.support import policy, prompt_data, trainer


@pytest.mark.parametrize("weights", [None, "bf16", "int8"])
@pytest.mark.parametrize("make", [CachedEngine, ContinuousEngine])
def test_a_run_says_whose_log_probabilities_it_takes(
    make: Any, weights: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if weights == "int8":
        pytest.importorskip("torchao")
    module = policy(engine=make(4, weights=weights))
    run = trainer(tmp_path, max_steps=1, logger=CSVLogger(tmp_path))
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        run.fit(module, datamodule=prompt_data(tmp_path))
    (said,) = [r.getMessage() for r in caplog.records if "rollout.old_logps is auto" in r.getMessage()]
    gap, trusts = (float(run.logged_metrics[f"startup/{name}"]) for name in ("engine_logratio", "trusts_engine"))
    assert f"{gap:.1e} nats" in said
    assert (gap < 1e-5) is (weights is None) is module.engine_agrees and trusts == float(weights is None)
    assert ("the engine's own are taken" if weights is None else "of a forward pass of training are taken") in said


def read(module: Any, tmp_path: Path) -> int:
    """Bytes a token of weights that a collection's steps read."""
    run = trainer(tmp_path, max_steps=1, logger=CSVLogger(tmp_path))
    with Stopwatch() as watch:
        run.fit(module, datamodule=prompt_data(tmp_path))
    assert float(run.logged_metrics["perf/rollout_bandwidth"]) > 0
    return watch.amount("decode") // watch.count("decode")


def test_the_bandwidth_counts_the_weights_that_decode(tmp_path: Path) -> None:
    module = policy(engine=CachedEngine(1))
    plain = read(module, tmp_path)
    network: Any = module.network_of("policy")
    matrices = sum(p.numel() for p in network.parameters() if p.dim() == 2)
    assert plain == 4 * matrices
    assert read(policy(engine=CachedEngine(1, weights="bf16")), tmp_path) == 2 * matrices
    many = read(policy(engine=CachedEngine(weights="bf16")), tmp_path)
    if multiplies(torch.ones(1), torch.bfloat16):
        assert many == 2 * matrices
    else:  # several rows are multiplied with a float32 copy
        assert 2 * matrices < many <= 4 * matrices


def test_amounts_of_spans_add_up() -> None:
    with Stopwatch() as watch:
        for amount in (3, 4):
            with span("inner", amount):
                pass
        with span("inner"):
            pass
    assert watch.amount("inner") == 7 and watch.amount("other") == 0
    watch.reset()
    assert watch.amount("inner") == 0
