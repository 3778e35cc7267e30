"""Which strategies and settings are refused; what sharding computes is in test_distributed.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from torch import nn

from lit_palm.modules.sharding import Sharding, check_strategy
from lit_palm.parallel.sharded import unsharded
from lit_palm.testing.processes import Program
from tests.support import write_jsonl

ROOT = Path(__file__).parents[2]


def test_strategies_that_would_not_train_together_are_refused() -> None:
    for strategy in (SingleDeviceStrategy(torch.device("cpu")), DDPStrategy(), ModelParallelStrategy(), FSDPStrategy()):
        check_strategy(strategy)

    class Other(DeepSpeedStrategy):
        def __init__(self) -> None:
            pass

    with pytest.raises(ValueError, match=r"trainer\.strategy: Other is none that lit_palm can set up.*fsdp"):
        check_strategy(Other())


@pytest.mark.parametrize(
    "strategy, sharding, match",
    [
        (DDPStrategy, {"offload": True}, r"model\.sharding\.offload is for ModelParallelStrategy.*leave it out$"),
        (FSDPStrategy, {"offload": True}, r"model\.sharding\.offload .*use cpu_offload: true of FSDPStrategy"),
        (FSDPStrategy, {"shard_size": 2}, r"model\.sharding\.shard_size .*HYBRID_SHARD"),
        (lambda: FSDPStrategy(use_orig_params=False), {}, r"use_orig_params: false"),
    ],
)
def test_what_a_strategy_cannot_do_is_refused(strategy: Any, sharding: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check_strategy(strategy(), Sharding(**sharding))


@pytest.mark.parametrize("fields", [{"gather": "all"}, {"frozen": "cold"}, {"param_dtype": "int8"}, {"shard_size": 0}])
def test_wrong_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"sharding.{next(iter(fields))}"):
        Sharding(**fields)


def test_whole_networks_need_no_gathering() -> None:
    network = nn.Linear(2, 2)
    before = network.weight
    with unsharded(network) as caller:
        assert caller is network and network.weight is before
    assert network.weight is before


CONFIG = """
trainer: {accelerator: cpu, devices: 1, logger: false, enable_checkpointing: false, max_steps: 1,
          strategy: {class_path: ModelParallelStrategy, init_args: {data_parallel_size: %d, tensor_parallel_size: 1}}}
model:
  class_path: LitLanguageModel
  init_args: {network: {class_path: PaLMConfig, init_args: {d_model: 16}}, sharding: %s}
data: {class_path: TextData, init_args: {train: %s, tokenizer: bytes}}
"""


@pytest.mark.parametrize(
    "size, sharding, message",
    [(3, "{}", "should equal the world size (1)"), (1, "{shard_size: 2}", "model.sharding.shard_size is 2")],
)
def test_sizes_that_do_not_fit_are_one_line(size: int, sharding: str, message: str, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "text.jsonl", [{"text": "a text"}])
    (tmp_path / "run.yaml").write_text(CONFIG % (size, sharding, data))
    environment = {**os.environ, "LIT_PALM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    arguments = ["fit", "--config", str(tmp_path / "run.yaml")]
    done = Program("lit_palm", arguments, tmp_path / "log", environment, ROOT).finish(120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("lit-palm: error: ")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr
