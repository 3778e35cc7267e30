"""Which strategies and settings are refused; what sharding computes is in test_distributed.py."""

from __future__ import annotations

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
