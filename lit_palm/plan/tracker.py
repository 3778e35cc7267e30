"""Counts bytes alive and bytes communicated while torch code runs, on fake tensors or on real ones.

Every result of an operation is a tensor with a storage; a storage counts from when it is first seen until it is
collected, at the size it has then (FSDP2 empties storages and fills them again without freeing them). What kernels
allocate inside is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Tracker"]

# Collectives by the operator's name: what is counted is the larger side, the whole of what is gathered or reduced.
COLLECTIVES = {
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_out": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
}


def _adds_up(args: Any) -> bool:
    one, other = args[:2]
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    return one.shape == other.shape and one.dtype == other.dtype


class Tracker(TorchDispatchMode):
    """A context in which memory and traffic are counted.

    Args:
        selected: rows that `nonzero` finds, because a fake tensor does not know.

    Attributes:
        live: bytes alive by the label that was set when they were allocated.
        peak: most bytes alive at once.
        at_peak: `live` at that moment, and `peak_label` what was going on.
        traffic: bytes communicated, by kind of collective.
        peaks: most bytes alive at once while each label was set.
    """

    def __init__(self, selected: int = 0) -> None:
        super().__init__()
        self.selected = selected
        self.label = "other"
        self.live: Counter[str] = Counter()
        self.peak, self.peak_label = 0, ""
        self.at_peak: dict[str, int] = {}
        self.peaks: Counter[str] = Counter()
        self.traffic: Counter[str] = Counter()
        self.paused = False
        self._known: Any = WeakIdKeyDictionary()
        self._resize: Any = None
        self._propagate: Any = None

    def __enter__(self) -> Tracker:
        resize = self._resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage in self._known:
                self._change(storage, size)
            return result

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign, assignment]
        propagate = self._propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def apart(*args: Any, **kwargs: Any) -> Any:
            # DTensor finds the shape of a result on fake tensors of the whole: they never are
            before, self.paused = self.paused, True
            try:
                return propagate(*args, **kwargs)
            finally:
                self.paused = before

        ShardingPropagator._propagate_tensor_meta_non_cached = apart  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = self._propagate  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it comes again for the local tensors
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "nonzero":
            return torch.zeros(self.selected, args[0].dim(), dtype=torch.long)
        if name == "_local_scalar_dense":
            return 1.0 if args[0].dtype.is_floating_point else 1
        if name == "add" and self.label == "backward" and not torch.is_grad_enabled() and _adds_up(args):
            # two gradients of one tensor: torch adds them in place, but not while somebody watches
            return args[0].add_(args[1])
        if name in COLLECTIVES and func.namespace in ("c10d", "_c10d_functional"):
            sizes = [t.untyped_storage().nbytes() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            result = func(*args, **kwargs)
            sizes += [t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, Tensor)]
            self.traffic[COLLECTIVES[name]] += max(sizes)
        else:
            result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        if self.paused:
            return
        storage = tensor.untyped_storage()
        if storage not in self._known:
            cell = self._known[storage] = [0, self.label]
            weakref.finalize(storage, self._gone, cell)
            self._change(storage, storage.nbytes())

    def _change(self, storage: torch.UntypedStorage, size: int) -> None:
        cell = self._known[storage]
        self.live[cell[1]] += size - cell[0]
        cell[0] = size
        total = sum(self.live.values())
        if total > self.peaks[self.label]:
            self.peaks[self.label] = total
        if total > self.peak:
            self.peak, self.peak_label, self.at_peak = total, self.label, dict(self.live)

    def _gone(self, cell: list[Any]) -> None:
        self.live[cell[1]] -= cell[0]

    @contextmanager
    def doing(self, label: str) -> Iterator[None]:
        """Label what is allocated."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before
