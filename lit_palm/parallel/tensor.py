"""PaLM's block split over the processes of a tensor-parallel group (Shoeybi et al. 2019, for a parallel block).

Each process computes some of the query heads and a part of the feed-forward, so that a block needs one sum over the
group in its forward pass and one in its backward pass:

    x -> norm -> [own queries, keys, values, gate, up] -> [own heads, own part of the feed-forward] -> sum -> + x

The one key/value head that all query heads share is computed by every process; each finds the gradient of its own
queries only, so the gradients of keys and values are summed. The fused matrix of a whole block is kept as five, since
its parts are split differently; a checkpoint that holds five is read as one (`Joined`), and one as five (`origins`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from lit_palm.models.base import ScalarNetwork
from lit_palm.models.palm import Block, PaLM, PaLMConfig
from lit_palm.models.weights import local

__all__ = ["Joined", "ParallelBlock", "parallelize"]

FUSED = "attn_ffn_in.weight"
PARTS = ("q", "k", "v", "gate", "up")
"""What the rows of the fused matrix are, in order."""


class ParallelBlock(Block):
    """This process's part of a block.

    Args:
        config: of the whole network.
        index: of the block.
        mesh: the tensor-parallel group, one-dimensional.

    Raises:
        ValueError: heads or feed-forward cannot be split over so many processes.
    """

    def __init__(self, config: PaLMConfig, index: int, mesh: DeviceMesh) -> None:
        super().__init__(config, index)
        size, rank = mesh.size(), mesh.get_local_rank()
        heads, kv_heads, d_ffn = config.num_heads, config.num_kv_heads, config.d_ffn or 4 * config.d_model
        for name, number in (("num_heads", heads), ("d_ffn", d_ffn)):
            if number % size:
                raise ValueError(
                    f"trainer.strategy: tensor_parallel_size is {size}, which does not divide the network's {name} "
                    f"({number}): choose a divisor"
                )
        if kv_heads % size and size % kv_heads:
            raise ValueError(
                f"trainer.strategy: tensor_parallel_size is {size}; with {kv_heads} key/value heads it must be a "
                "divisor or a multiple of them"
            )
        del self.attn_ffn_in
        self.group = mesh.get_group()
        split = kv_heads % size == 0
        self.num_heads, self.num_kv_heads = heads // size, max(1, kv_heads // size)
        self.kv_rows: slice | None = None
        if not split:  # the one head that this process's queries share
            own = rank * kv_heads // size
            self.kv_rows = slice(own * self.head_dim, (own + 1) * self.head_dim)
        rows = (heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.head_dim, d_ffn, d_ffn)
        self.q, self.k, self.v, self.gate, self.up = (nn.Linear(config.d_model, n, bias=False) for n in rows)
        self.origins = {f"{name}.weight": (FUSED, sum(rows[:place])) for place, name in enumerate(PARTS)}
        """Which rows of the fused matrix the weights are."""
        whole = Replicate()
        kv: Placement = Shard(0) if split else whole
        for module, placement in (
            (self.q, Shard(0)), (self.k, kv), (self.v, kv), (self.gate, Shard(0)), (self.up, Shard(0)),
            (self.attn_out, Shard(1)), (self.ffn_out, Shard(1)), (self.norm, whole),
        ):  # fmt: skip
            spread(module, mesh, placement)
        if self.q_norm is not None and self.k_norm is not None:
            per_head = config.qk_norm == "layer"
            spread(self.q_norm, mesh, Shard(0) if per_head else whole)
            spread(self.k_norm, mesh, Shard(0) if per_head and split else whole)
            self.q_norm.shared, self.k_norm.shared = not per_head, not (per_head and split)
            self.k_norm.head = rank * kv_heads // size if per_head and not split else None

    def project(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        x_BTD = _Spread.apply(x_BTD, self.group)
        q = F.linear(x_BTD, local(self.q.weight))
        k, v = (F.linear(x_BTD, self._kv(module.weight)) for module in (self.k, self.v))
        hidden = F.silu(F.linear(x_BTD, local(self.gate.weight))) * F.linear(x_BTD, local(self.up.weight))
        return torch.cat((q, k), -1), v, hidden

    def _kv(self, weight: Tensor) -> Tensor:
        if self.kv_rows is None:
            return local(weight)
        return local(weight, summed=True)[self.kv_rows]

    def join(self, attended: Tensor, hidden: Tensor) -> Tensor:
        own = F.linear(attended, local(self.attn_out.weight)) + F.linear(hidden, local(self.ffn_out.weight))
        result: Tensor = _Sum.apply(own, self.group)
        return result


class _Spread(torch.autograd.Function):
    """The same on every process; the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum over the processes; each has the gradient of it already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def parallelize(network: nn.Module, mesh: DeviceMesh) -> None:
    """Split the blocks of a PaLM, or of one below a scalar head, in place; it must be on the meta device.

    Args:
        network: on the meta device; its weights are filled afterwards.
        mesh: the tensor-parallel group, one-dimensional.

    Raises:
        ValueError: it is another network, or cannot be split over so many processes.
    """
    trunk = network.trunk if isinstance(network, ScalarNetwork) else network
    if not isinstance(trunk, PaLM):
        raise ValueError(
            f"trainer.strategy: tensor_parallel_size is {mesh.size()}, and a {type(trunk).__name__} cannot be split "
            "within its blocks: set it to 1"
        )
    with torch.device("meta"):
        for index in range(len(trunk.layers)):
            trunk.layers[index] = ParallelBlock(trunk.config, index, mesh)
    spread(trunk.embedding, mesh, Shard(0))
    spread(trunk.norm, mesh, Replicate())
    if isinstance(network, ScalarNetwork):
        spread(network.head, mesh, Replicate())


def spread(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """Make the parameters of one module, on the meta device, DTensors."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        value = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        setattr(module, name, nn.Parameter(value, requires_grad=parameter.requires_grad))


class Joined(Mapping[str, Tensor]):
    """Weights by name, some of which may be the five parts of fused matrices, as if they were fused."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        blocks = {name.removesuffix("q.weight") for name in weights if name.endswith(".q.weight")}
        self._parts = {f"{block}{FUSED}": [f"{block}{part}.weight" for part in PARTS] for block in sorted(blocks)}
        self._parts = {k: parts for k, parts in self._parts.items() if all(part in weights for part in parts)}
        hidden = {part for parts in self._parts.values() for part in parts}
        self._names = [*(name for name in weights if name not in hidden), *self._parts]

    def __getitem__(self, name: str) -> Tensor:
        if name in self._parts:
            return torch.cat([self.weights[part] for part in self._parts[name]])
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it where the weights tell."""
        of: Any = getattr(self.weights, "shape", lambda name: tuple(self.weights[name].shape))
        shapes = [of(part) for part in self._parts.get(name, [name])]
        return (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
