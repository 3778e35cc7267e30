"""Networks spread over devices: what `ModelParallelStrategy` (FSDP2) needs from the modules.

Each trained network is a root of its own, so that it can be called outside `training_step`, and each of its blocks a
unit that is gathered for its forward and backward pass and freed again. Frozen networks are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import nn

from lit_palm.models.base import Network, ScalarNetwork

__all__ = ["check_strategy", "gathered", "shard"]


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which the networks of different ranks would train apart from each other.

    Raises:
        ValueError: naming the way out.
    """
    name = type(strategy).__name__
    if isinstance(strategy, ModelParallelStrategy):
        if strategy.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                f"trainer.strategy: {name} would split single matrices, which lit_palm does not do; set its "
                "data_parallel_size to the number of all devices and its tensor_parallel_size to 1"
            )
    elif not isinstance(strategy, DDPStrategy | SingleDeviceStrategy):
        raise ValueError(
            f"trainer.strategy: {name} is none that lit_palm can set up; use auto, ddp, or "
            "ModelParallelStrategy to shard"
        )


def shard(network: nn.Module, mesh: Any) -> None:
    """Spread the parameters of a network, and of each of its blocks, over the ranks of a mesh."""
    from torch.distributed.fsdp import fully_shard

    trunk = network.trunk if isinstance(network, ScalarNetwork) else network
    assert isinstance(trunk, Network)
    for block in trunk.blocks():
        fully_shard(block, mesh=mesh)
    # weights that were gathered for a forward pass without gradients are freed after it, the root's too
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


@contextmanager
def gathered(networks: nn.Module) -> Iterator[None]:
    """Whole weights on every rank, without which each forward pass would wait for all ranks to make it.

    Ranks sample completions of different lengths, so they make different numbers of passes.
    """
    from torch.distributed.fsdp import FSDPModule

    units = [module for module in networks.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()
