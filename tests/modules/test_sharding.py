"""Which strategies are refused; what sharding computes is in test_distributed.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn

from lit_palm.modules.sharding import check_strategy, gathered


class Meshed(ModelParallelStrategy):
    """Has a mesh without a process group."""

    tensor_parallel = 1

    @property
    def device_mesh(self) -> Any:
        return {"tensor_parallel": SimpleNamespace(size=lambda: self.tensor_parallel)}


class Split(Meshed):
    tensor_parallel = 2


def test_strategies_that_would_not_train_together_are_refused() -> None:
    for strategy in (SingleDeviceStrategy(torch.device("cpu")), DDPStrategy(), Meshed()):
        check_strategy(strategy)
    with pytest.raises(ValueError, match=r"trainer\.strategy: FSDPStrategy is none that lit_palm can set up.*ddp"):
        check_strategy(FSDPStrategy())
    with pytest.raises(ValueError, match=r"set its data_parallel_size .* tensor_parallel_size to 1"):
        check_strategy(Split())


def test_whole_networks_need_no_gathering() -> None:
    network = nn.Linear(2, 2)
    before = network.weight
    with gathered(network):
        assert network.weight is before
    assert network.weight is before
