"""Weights read piece by piece: fresh ones, or those of a checkpoint, into a network that may hold only a part of each.

A `Source` gives rows of a weight by its name; `fill` asks for the rows that the network at hand has. So a process reads
only its shard, and none ever holds a network that does not fit.

Fresh weights are a function of (seed, name, place), drawn in blocks of rows, each from a generator of its own on the
host. Any number of processes, on any device, starts from the same weights.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

__all__ = ["Fresh", "Source", "fill", "fresh_seed", "give_memory", "local", "named_weights", "normal_rows"]

BLOCK = 2**20
"""Numbers drawn by one generator, about; part of what a seed means."""
CHUNK = 2**24
"""Numbers read at a time, about."""


class Source(ABC):
    """Where weights come from."""

    @abstractmethod
    def names(self) -> Iterable[str]:
        """The names of all weights."""

    @abstractmethod
    def shape(self, name: str) -> Sequence[int]:
        """The shape of a weight."""

    @abstractmethod
    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop of a weight along its first dimension, on any device; the whole of a scalar."""


class Fresh(Source):
    """What a new network starts with, as its `initial_std` says.

    Args:
        network: has the shapes; may be on the meta device.
        seed: of all its weights.
    """

    def __init__(self, network: nn.Module, seed: int) -> None:
        self.network, self.seed = network, seed
        self.shapes = {name: tuple(tensor.shape) for name, tensor in named_weights(network)}
        self.drawn_as = getattr(network, "drawn_as", str)

    def names(self) -> Iterable[str]:
        return self.shapes

    def shape(self, name: str) -> Sequence[int]:
        return self.shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        std, shape = self.network.initial_std(name), self.shapes[name]  # type: ignore[operator]
        if std is None or std == 0.0:
            size = (stop - start, *shape[1:]) if shape else ()
            return torch.full(size, 1.0 if std is None else 0.0, device=_host())
        return normal_rows(self.seed, self.drawn_as(name), shape, std, start, stop)


def fresh_seed() -> int:
    """A seed drawn from torch's own generator, so that `torch.manual_seed` decides what networks start from."""
    return int(torch.randint(2**62, (), device=_host()))


def normal_rows(seed: int, name: str, shape: Sequence[int], std: float, start: int, stop: int) -> Tensor:
    """Rows start .. stop of a tensor of independent N(0, std^2) numbers.

    Args:
        seed: of the network.
        name: of the weight.
        shape: of the whole weight.
        std: standard deviation.
        start: first row.
        stop: row after the last.

    Returns:
        [stop - start, *shape[1:]] in float32, on the host.
    """
    size = max(1, BLOCK // max(math.prod(shape[1:]), 1))
    rows = torch.empty(stop - start, *shape[1:], dtype=torch.float32, device=_host())
    for block in range(start // size, -(-stop // size)):
        first, last = block * size, min((block + 1) * size, shape[0])
        digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn = torch.empty(last - first, *shape[1:], dtype=torch.float32, device=_host())
        drawn.normal_(generator=generator)
        low, high = max(first, start), min(last, stop)
        rows[low - start : high - start] = drawn[low - first : high - first]
    return rows.mul_(std)


def give_memory(network: nn.Module, device: torch.device, only: Collection[str] | None = None) -> list[str]:
    """Put weights that are on the meta device on another one, uninitialised.

    Args:
        network: in place.
        device: gets them.
        only: names of those that are wanted; None: all.

    Returns:
        The names of those that were given memory.
    """
    found = [name for name, tensor in named_weights(network) if tensor.is_meta and (only is None or name in only)]
    for name in found:
        path, _, own = name.rpartition(".")
        module = network.get_submodule(path)
        old = getattr(module, own)
        new: Tensor = torch.empty_like(old, device=device)
        setattr(module, own, nn.Parameter(new, requires_grad=old.requires_grad) if own in module._parameters else new)
    return found


@torch.no_grad()
def fill(network: nn.Module, source: Source, only: Collection[str] | None = None) -> None:
    """Copy into a network the rows that it holds; weights without memory (meta, fake) are passed over.

    A module may say in `origins` that a weight of its own is a part of another one: {own: (name there, first row)}.

    Args:
        network: gets the weights.
        source: has them under the same names.
        only: names of those that are wanted; None: all.
    """
    for name, tensor in named_weights(network):
        if only is not None and name not in only:
            continue
        where, first = _origin(network, name)
        part, place = _own_part(tensor)
        if part.is_meta or isinstance(part, FakeTensor) or part.numel() == 0:
            continue
        if part.dim() == 0:
            part.copy_(source.rows(where, 0, 1).reshape(()))
            continue
        first += place[0]
        step = max(1, CHUNK // max(math.prod(tensor.shape[1:]), 1))
        for start in range(0, len(part), step):
            stop = min(start + step, len(part))
            rows = source.rows(where, first + start, first + stop)
            for dim in range(1, part.dim()):
                rows = rows.narrow(dim, place[dim], part.shape[dim])
            part[start:stop].copy_(rows)


def named_weights(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and the buffers that a state dictionary holds, by name."""
    yield from network.named_parameters()
    for path, module in network.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def local(weight: Tensor, summed: bool = False) -> Tensor:
    """This process's part of a weight, to compute with; a weight that is not spread is its own part.

    Args:
        weight: a parameter.
        summed: each process finds only a part of the gradient of a replicated weight, and their sum is what counts.
    """
    if not isinstance(weight, DTensor):
        return weight
    if not summed:
        return weight.to_local()
    from torch.distributed.tensor import Partial

    return weight.to_local(grad_placements=[Partial() for _ in weight.placements])


def _own_part(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """What this process holds of a tensor, and where it begins."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.dim()
    _, place = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(place)


def _origin(network: nn.Module, name: str) -> tuple[str, int]:
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        origins = getattr(network.get_submodule(".".join(parts[:depth])), "origins", None)
        own = ".".join(parts[depth:])
        if origins and own in origins:
            there, row = origins[own]
            return ".".join([*parts[:depth], there]), row
    return name, 0


def _host() -> torch.device:
    return torch.Generator().device
