"""How a strategy spreads networks over devices: what each process holds, and how passes go on together.

`Layout` is read from the Trainer's strategy, once processes know each other. It makes networks from blueprints, whole
or in parts, and says which processes see the same rows:

    SingleDeviceStrategy, DDPStrategy   whole networks
    ModelParallelStrategy               FSDP2 over its `data_parallel` mesh; a PaLM's blocks are split over its
                                        `tensor_parallel` mesh first, whose processes see the same rows
    FSDPStrategy                        FSDP1

The processes that see different rows are the data-parallel ones; `rank` and `size` count those.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

from lit_palm.models.adapted import AdaptedNetwork
from lit_palm.models.weights import fill
from lit_palm.modules.weights import Blueprint
from lit_palm.parallel import sharded, tensor
from lit_palm.parallel.lockstep import LockStep

__all__ = ["Layout", "Sharding", "check_strategy", "fsdp_options"]

Frozen = Literal["sharded", "offloaded", "whole"]
Gather = Literal["auto", "whole", "layers"]
ParamDtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass
class Sharding:
    """How networks are spread, where the Trainer's strategy spreads them; without one, only `frozen` has a meaning."""

    gather: Gather = "auto"
    """Weights of the policy while it samples: `whole` on every device, which is quick; `layers`: one block at a time,
    all processes in step; `auto`: whole where that takes at most half of the memory that is free."""
    frozen: Frozen = "sharded"
    """The reference and reward models: `sharded` like the trained networks; `offloaded` to the host between uses;
    `whole` on every device."""
    offload: bool = False
    """Keep trained parameters, gradients and optimiser on the host (FSDP2; FSDPStrategy has `cpu_offload`). On GPUs the
    strategy then needs process_group_backend "cpu:gloo,cuda:nccl"."""
    shard_size: int | None = None
    """Hybrid sharding (FSDP2; FSDPStrategy has `device_mesh`): shard over so many neighbouring devices, usually those
    of a machine, and replicate over the others; null: shard over all."""
    reshard_after_forward: bool = True
    """Free the weights of a block between its forward and its backward pass (FSDP2); false takes more memory and
    gathers once instead of twice."""
    param_dtype: ParamDtype = "auto"
    """What weights are gathered as (FSDP2): `auto` is bfloat16 under precision bf16-mixed, else as they are kept.
    Gradients are summed in float32."""

    def __post_init__(self) -> None:
        for name, choices in (("gather", Gather), ("frozen", Frozen), ("param_dtype", ParamDtype)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"sharding.{name} is {getattr(self, name)!r}: choose {', '.join(get_args(choices))}")
        if self.shard_size is not None and self.shard_size < 1:
            raise ValueError(f"sharding.shard_size is {self.shard_size}: set it to at least 1, or leave it out")


def check_strategy(strategy: Strategy, sharding: Sharding | None = None) -> None:
    """Refuse a strategy under which the networks of different ranks would train apart from each other.

    Raises:
        ValueError: naming the way out.
    """
    name = type(strategy).__name__
    known = isinstance(strategy, DDPStrategy | SingleDeviceStrategy | ModelParallelStrategy | FSDPStrategy)
    if not known or isinstance(strategy, DeepSpeedStrategy):  # which is a DDPStrategy by descent alone
        raise ValueError(
            f"trainer.strategy: {name} is none that lit_palm can set up; use auto, ddp, fsdp, or ModelParallelStrategy"
        )
    sharding = sharding or Sharding()
    only = {
        "offload": ("cpu_offload: true of FSDPStrategy", sharding.offload),
        "shard_size": ("sharding_strategy: HYBRID_SHARD of FSDPStrategy", sharding.shard_size is not None),
    }
    for key, (instead, is_set) in only.items():
        if is_set and not isinstance(strategy, ModelParallelStrategy):
            raise ValueError(
                f"model.sharding.{key} is for ModelParallelStrategy, the strategy is {name}: leave it out"
                + (f", and use {instead}" if isinstance(strategy, FSDPStrategy) else "")
            )
    if isinstance(strategy, FSDPStrategy) and not strategy.kwargs.get("use_orig_params", True):
        raise ValueError(
            "trainer.strategy: FSDPStrategy with use_orig_params: false leaves one flat parameter, whose matrices and "
            "vectors cannot be told apart: leave it out"
        )


def fsdp_options(mesh: Any, sharding: Sharding, precision: str, offload: bool = False) -> dict[str, Any]:
    """The options of `fully_shard`.

    Args:
        mesh: to shard over; of two dimensions, replicated over the first.
        sharding: the user's choices.
        precision: of the Trainer.
        offload: parameters stay on the host between their uses.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    dtype = sharding.param_dtype
    if dtype == "auto":
        dtype = "bfloat16" if precision == "bf16-mixed" else "float32"
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": sharding.reshard_after_forward}
    if dtype != "float32":
        # inputs stay as they are: the rotary tables must not be rounded
        options["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=getattr(torch, dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
    return options


class Layout:
    """What this process is among all, and what it holds.

    Args:
        strategy: of the Trainer, with its processes connected.
        sharding: the user's choices.
        precision: of the Trainer.

    Raises:
        ValueError: the sizes do not divide.
    """

    def __init__(self, strategy: Any, sharding: Sharding, precision: str) -> None:
        self.strategy, self.sharding, self.precision = strategy, sharding, precision
        self.device: torch.device = strategy.root_device
        self.group: Any = None
        """Of the processes that see different rows; None: all."""
        self._in_step: LockStep | None = None
        if isinstance(strategy, ModelParallelStrategy):
            rows = strategy.device_mesh["data_parallel"]
            self.rank, self.size, self.group = rows.get_local_rank(), rows.size(), rows.get_group()
        else:
            self.rank, self.size = strategy.global_rank, strategy.world_size
        if self.sharding.shard_size is not None and self.size % self.sharding.shard_size:
            raise ValueError(
                f"model.sharding.shard_size is {self.sharding.shard_size}, which does not divide the {self.size} "
                "data-parallel processes: choose a divisor"
            )

    # ------------------------------------------------------------------ together with the others

    def sum(self, value: Tensor) -> Tensor:
        """The sum over the processes that see different rows."""
        if self.size == 1:
            return value
        self._settle()
        value = value.clone()
        dist.all_reduce(value, group=self.group)
        return value

    def everywhere(self, value: Tensor) -> Tensor:
        """The sum over all processes, also those that see the same rows."""
        if self.strategy.world_size == 1:
            return value
        self._settle()
        value = value.clone()
        dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """What each of the processes that see different rows has, by rank."""
        if self.size == 1:
            return [value]
        self._settle()
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, value, group=self.group)
        return parts

    def raise_everywhere(self, error: Exception | None) -> None:
        """Where one process failed, all do, instead of waiting for it; by every process.

        Raises:
            RuntimeError: with the words of the first that failed; there, its own error.
        """
        told = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        first = next((text for text in told if text is not None), None)
        if first is not None:
            raise RuntimeError(first)

    def _settle(self) -> None:
        """Others may still be making passes that need this process."""
        if self._in_step is not None:
            self._in_step.settle()

    @property
    def shards(self) -> bool:
        """Whether trained networks are spread."""
        return isinstance(self.strategy, ModelParallelStrategy | FSDPStrategy)

    # ------------------------------------------------------------------ networks

    def make(self, blueprint: Blueprint, frozen: bool = False) -> nn.Module:
        """The network of a blueprint, or this process's part of it.

        Args:
            blueprint: what to make.
            frozen: it is not trained.
        """
        if not self.shards or (frozen and self.sharding.frozen == "whole"):
            network = blueprint.whole()
            return network.requires_grad_(False).eval() if frozen else network
        source = blueprint.source
        if blueprint.in_parts:
            with torch.device("meta"):
                network = blueprint.structure()
        else:
            network = blueprint.whole()
        if frozen:
            network.requires_grad_(False).eval()
        offload = self.sharding.frozen == "offloaded" if frozen else self.sharding.offload
        if isinstance(self.strategy, FSDPStrategy):
            # a device that is the host itself has nowhere else to keep them
            return sharded.wrap(network, self._wrapper(offload and self.device != _host()), source, self.device)
        if self._mesh["tensor_parallel"].size() > 1:
            tensor.parallelize(network, self._mesh["tensor_parallel"])
        names = self._mesh.mesh_dim_names
        mesh = self._mesh["replicate", "shard"] if "replicate" in names else self._mesh["data_parallel"]
        sharded.shard(network, **fsdp_options(mesh, self.sharding, self.precision, offload))
        if blueprint.in_parts:
            network.to_empty(device=_host() if offload else self.device)
            fill(network, source)
        return network

    @cached_property
    def _mesh(self) -> Any:
        """(data_parallel, tensor_parallel), or with hybrid sharding (replicate, shard, tensor_parallel)."""
        assert isinstance(self.strategy, ModelParallelStrategy)
        mesh = self.strategy.device_mesh
        across = self.sharding.shard_size
        if across is None or across == self.size:
            return mesh
        sizes = (self.size // across, across, mesh["tensor_parallel"].size())
        names = ("replicate", "shard", "tensor_parallel")
        return dist.device_mesh.init_device_mesh(self.device.type, sizes, mesh_dim_names=names)

    def _wrapper(self, offload: bool) -> Callable[[nn.Module], nn.Module]:
        """What Lightning's FSDPStrategy would wrap a module in, inside `configure_model`."""
        from torch.distributed.fsdp import CPUOffload
        from torch.distributed.fsdp.wrap import wrap

        options: dict[str, Any] = {"device_id": self.device, "auto_wrap_policy": None, "use_orig_params": True}
        if offload:
            options["cpu_offload"] = CPUOffload(offload_params=True)
        return partial(wrap, **options)

    # ------------------------------------------------------------------ passes

    @contextmanager
    def passes(self, sampled: nn.Module | None, others: Sequence[nn.Module]) -> Iterator[nn.Module | None]:
        """Passes without gradients whose number may differ from process to process.

        Args:
            sampled: the network that completions are drawn from.
            others: networks that are run beside it.

        Yields:
            What to call instead of `sampled`.
        """
        everything = [n for n in others if n is not sampled]
        with ExitStack() as stack:
            caller = sampled
            if sampled is not None and sharded.is_sharded(sampled):
                if self._gathers(sampled):
                    caller = stack.enter_context(sharded.unsharded(sampled, self.sharding.reshard_after_forward))
                else:
                    everything.insert(0, sampled)
            in_step = [n for n in everything if sharded.is_sharded(n)]
            if in_step and self.strategy.world_size > 1:
                self._in_step = stack.enter_context(LockStep(in_step, self.device))
            try:
                yield caller
            finally:
                self._in_step = None

    def _gathers(self, network: nn.Module) -> bool:
        """Whether whole weights fit, the same on every process."""
        if isinstance(network, FSDP) and isinstance(network.module, AdaptedNetwork):
            return False  # a copy would need all roles
        if self.sharding.gather != "auto":
            return self.sharding.gather == "whole"
        size = sum(p.numel() * p.element_size() for p in network.parameters())
        if isinstance(self.strategy, FSDPStrategy):  # which shows the local part
            size *= self.size
        lacks = torch.tensor(float(2 * size > _free_bytes(self.device)), device=self.device)
        return not self.everywhere(lacks)


def _free_bytes(device: torch.device) -> int:
    """Memory of a device that is not in use."""
    if device.type == _host().type:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free, _ = torch.get_device_module(device).mem_get_info(device)
    return int(free)


def _host() -> torch.device:
    return torch.Generator().device
