"""What a run saves, taken between two steps: a checkpoint that training cannot change any more.

Lightning gathers the checkpoint; its tensors are those that training goes on to change. `Buffers` copies them into
memory that is allocated once and used again, page-locked where they come from a GPU, and copies everything else too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.tensor import DTensor

__all__ = ["Buffers", "gather", "writes_shards"]


def writes_shards(strategy: Any) -> str | None:
    """What a strategy calls the weights in the folder of shards that it writes; None: it writes a file."""
    if isinstance(strategy, ModelParallelStrategy) and strategy._save_distributed_checkpoint:
        return "state_dict"
    if isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded":
        return "model"
    return None


def gather(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The checkpoint of a run, by Lightning's own hooks; every rank must call it.

    Returns:
        The checkpoint, and of a strategy that writes shards the parts that are spread over the ranks, taken out of it;
        their layout is the strategy's own, so that Lightning alone could resume from them.
    """
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(False)
    key = writes_shards(trainer.strategy)
    if key is None:
        return checkpoint, None
    shards = {key: checkpoint.pop("state_dict")}
    for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
        shards[f"optimizer_{number}"] = state
    return checkpoint, shards


class Buffers:
    """Memory for one checkpoint, kept by the place of each tensor in it."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Tensor] = {}
        self._seen: dict[tuple[Any, ...], Tensor] = {}

    def reserve(self, tree: Any) -> None:
        """Allocate the memory that `copy` of a tree of the same shapes will need, and touch it.

        The first copy into fresh memory takes several times as long as later ones. Reads no values, so it may run
        beside training.
        """
        for path, tensor in tensors(tree):
            self._buffer(path, tensor).zero_()

    @torch.no_grad()
    def copy(self, tree: Any) -> Any:
        """A copy of nested dictionaries, lists and tuples, valid until the next call.

        Args:
            tree: tensors, DTensors and ShardedTensors in it are copied into the buffers, and those that share memory
                still do; everything else is copied by `copy.deepcopy`.
        """
        self._seen = {}
        copied = self._copy(tree, ())
        if any(buffer.is_pinned() for buffer in list(self._kept.values())[:1]):
            torch.accelerator.synchronize()  # copies from the device were only begun
        self._seen = {}
        return copied

    def _copy(self, value: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(value, DTensor):
            return DTensor(self._tensor(value._local_tensor, path), value._spec, requires_grad=False)
        if isinstance(value, ShardedTensor):
            shards = [
                Shard(self._tensor(shard.tensor, (*path, number)), shard.metadata)
                for number, shard in enumerate(value.local_shards())
            ]
            return ShardedTensor._init_from_local_shards_and_global_metadata(
                shards, sharded_tensor_metadata=value.metadata(), process_group=value._process_group
            )
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if isinstance(value, dict):
            copied = {k: self._copy(v, (*path, k)) for k, v in value.items()}
            return copied if type(value) is dict else _like(value, copied)
        if type(value) in (list, tuple):
            return type(value)(self._copy(v, (*path, number)) for number, v in enumerate(value))
        return copy.deepcopy(value)

    def _tensor(self, value: Tensor, path: tuple[Any, ...]) -> Tensor:
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            return value.detach().clone()
        # tied weights are one tensor under two names, and are written once
        identity = (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.device)
        if value.numel() and identity in self._seen:
            return self._seen[identity]
        buffer = self._buffer(path, value)
        buffer.copy_(value.detach(), non_blocking=True)
        self._seen[identity] = buffer
        return buffer

    def _buffer(self, path: tuple[Any, ...], like: Tensor) -> Tensor:
        kept = self._kept.get(path)
        if kept is None or kept.shape != like.shape or kept.dtype != like.dtype:
            kept = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._kept[path] = kept
        return kept


def _like(value: dict[Any, Any], copied: dict[Any, Any]) -> Any:
    """A dictionary of the class of another, such as the OrderedDict with metadata that `state_dict` returns."""
    made = copy.copy(value)
    made.clear()
    made.update(copied)
    return made


def tensors(tree: Any, path: tuple[Any, ...] = ()) -> Iterable[tuple[tuple[Any, ...], Tensor]]:
    """The tensors in a nested structure with their places, as `Buffers.copy` counts them."""
    if isinstance(tree, DTensor):
        yield path, tree._local_tensor
    elif isinstance(tree, ShardedTensor):
        for number, shard in enumerate(tree.local_shards()):
            yield (*path, number), shard.tensor
    elif isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors(value, (*path, key))
    elif type(tree) in (list, tuple):
        for number, value in enumerate(tree):
            yield from tensors(value, (*path, number))
