"""Networks whose parameters are spread over processes: FSDP2 (`fully_shard`) and FSDP1 (`FullyShardedDataParallel`).

Each network is a root of its own, so that it can be called by itself, and each of its blocks a unit that is gathered
for its passes and freed again. No process ever holds more of a fresh network than its shard and one unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor, Replicate

from lit_palm.models.base import Network, ScalarNetwork
from lit_palm.models.weights import Source, fill, give_memory, local, named_weights

__all__ = [
    "bare",
    "clean_name",
    "copy_whole",
    "is_sharded",
    "roots",
    "shard",
    "sum_over",
    "total_norm",
    "unsharded",
    "wrap",
]

Wrapper = Callable[[nn.Module], nn.Module]


def bare(network: nn.Module) -> nn.Module:
    """The network itself, out of the wrapper of FSDP1."""
    return network.module if isinstance(network, FSDP) else network


def clean_name(name: str) -> str:
    """The name of a weight without those of wrappers around its modules."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def is_sharded(network: nn.Module) -> bool:
    """Whether a pass of the network needs all processes of its group."""
    return isinstance(network, FSDP | FSDPModule)


def roots(network: nn.Module) -> Iterator[nn.Module]:
    """The outermost sharded networks in a module."""
    if is_sharded(network):
        yield network
    else:
        for child in network.children():
            yield from roots(child)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network, or of the one below a scalar head; none of a network of another kind."""
    trunk = network.trunk if isinstance(network, ScalarNetwork) else network
    return trunk.blocks() if isinstance(trunk, Network) else []


def shard(network: nn.Module, **options: Any) -> None:
    """FSDP2, in place, block by block and then the root; options are those of `fully_shard`."""
    for block in blocks_of(network):
        fully_shard(block, **options)
    # weights that were gathered for a forward pass without gradients are freed after it, the root's too
    fully_shard(network, **{**options, "reshard_after_forward": True})


def wrap(network: nn.Module, wrapper: Wrapper, source: Source, device: torch.device) -> nn.Module:
    """FSDP1: the wrapped network with its weights; they are read one unit at a time, each sharded before the next.

    Args:
        network: on the meta device, or whole (then its weights stay what they are).
        wrapper: wraps one module.
        source: of the weights.
        device: where they are read to.
    """
    names = {id(module): name for name, module in network.named_modules()}
    for block in blocks_of(network):
        name = names[id(block)]
        _materialize(network, f"{name}.", source, device)
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, wrapper(block))
    _materialize(network, "", source, device)
    return wrapper(network)


def _materialize(network: nn.Module, prefix: str, source: Source, device: torch.device) -> None:
    """Give what is on the meta device below a prefix memory, and its weights."""
    names = {name for name, _ in named_weights(network) if name.startswith(prefix)}
    found = give_memory(network, device, only=names)
    fill(network, source, only=found)


@contextmanager
def unsharded(network: nn.Module, reshards: bool = True) -> Iterator[nn.Module]:
    """Whole weights on every process of the group, so that each can make as many passes as it likes.

    Args:
        network: sharded.
        reshards: whether its blocks free their weights after a forward pass (FSDP2).

    Yields:
        What to call: the network itself, or for FSDP1, which cannot stay gathered, a copy of it.
    """
    if isinstance(network, FSDP):
        yield copy_whole(network)
        return
    units = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield network
    finally:
        for unit in units:
            unit.set_reshard_after_forward(reshards or unit is network, recurse=False)
            unit.reshard()


@torch.no_grad()
def copy_whole(network: FSDP) -> nn.Module:
    """A plain copy of a network wrapped in FSDP1, gathered one unit at a time."""
    inner = bare(network)
    assert isinstance(inner, Network)
    device = network.compute_device
    with torch.device("meta"):
        copy: nn.Module = inner.config.build()
    dtype = network.mixed_precision.param_dtype if network.mixed_precision is not None else None
    copy = copy.to(dtype or next(network.parameters()).dtype).to_empty(device=device).train(network.training)
    own = dict(named_weights(copy))
    for unit in FSDP.fsdp_modules(network):
        path = clean_name(next(name for name, module in network.named_modules() if module is unit) + ".").strip(".")
        below = {id(p) for child in FSDP.fsdp_modules(unit) if child is not unit for p in child.parameters()}
        with FSDP.summon_full_params(unit, recurse=False, writeback=False):
            for name, parameter in unit.named_parameters():
                if id(parameter) not in below:
                    full = ".".join(part for part in (path, clean_name(name)) if part)
                    own[full].copy_(parameter)
    return copy.requires_grad_(False)


def total_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """The norm of all gradients, over all processes, with the same bits on each.

    Args:
        parameters: whole, DTensors, or the local parts that FSDP1 leaves.
        device: of the result.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    parts = [local(grad) for grad in grads]
    norms = torch.stack(torch._foreach_norm(parts)).to(device).float() if parts else torch.zeros(1, device=device)
    return norms.norm() if not any(isinstance(g, DTensor) for g in grads) else _over_mesh(norms, grads)


def _over_mesh(norms: Tensor, grads: list[Tensor]) -> Tensor:
    """The norm of DTensors from those of their local parts; what several processes hold alike counts once."""
    copies = [
        math.prod(
            grad.device_mesh.size(dim) for dim, place in enumerate(grad.placements) if isinstance(place, Replicate)
        )
        if isinstance(grad, DTensor)
        else dist.get_world_size()
        for grad in grads
    ]
    # one sum over all processes: summing over one dimension of the mesh after the other may round otherwise on each
    # process, and what they hold alike would drift apart
    return sum_over(norms.square() / torch.tensor(copies, device=norms.device))


def sum_over(squares: Tensor, group: Any = None) -> Tensor:
    """The root of the sum of squares over all processes of a group."""
    total = squares.sum()
    dist.all_reduce(total, group=group)
    return total.sqrt()
