"""What would make the host wait for an accelerator, told apart on a machine without one.

`Waits` takes tensors for those of a device: the batch that the module's transfer hook gives, the parameters, and
whatever is computed from them, followed by their memory. It notes every operation that brings a number of theirs to
the host.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_palm.types import Experience

METHODS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__"}
"""Of these some do nothing on the host that would be seen below."""
OPERATIONS = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2", "unique_dim",
    "unique_consecutive", "repeat_interleave", "bincount", "allclose",
}  # fmt: skip


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Below(TorchDispatchMode):
    """Follows what is on the device, and sees operations of autograd too."""

    def __init__(self, owner: Waits) -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(memory(t) in self.owner.marked for t in given)
        name = func.overloadpacket.__name__
        if on_device:
            if name in OPERATIONS:
                self.owner.note(name)
            if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # a mask is counted first
                if any(t.dtype == torch.bool for t in tree_leaves(args[1]) if isinstance(t, Tensor)):
                    self.owner.note(f"{name} by a mask")
        result = func(*args, **(kwargs or {}))
        if on_device:
            self.owner.mark(result)
        return result


class Above(TorchFunctionMode):
    """Sees the methods that never get below on the host."""

    def __init__(self, owner: Waits) -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS and isinstance(args[0], Tensor) and memory(args[0]) in self.owner.marked:
            self.owner.note(name)
        elif name == "tensor" and (kwargs or {}).get("device") is not None:
            self.owner.note("a tensor made of numbers of the host")
        return func(*args, **(kwargs or {}))


class Waits(Callback):
    """Counts waits from the start of every training batch to its end, other callbacks' hooks included: be the first.

    Attributes:
        found: the waits of each batch, by name.
    """

    def __init__(self) -> None:
        self.marked: dict[int, Any] = {}
        self.found: list[list[str]] = []
        self._modes: list[Any] = []

    def note(self, name: str) -> None:
        self.found[-1].append(name)

    def mark(self, tensors: Any) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                self.marked[memory(tensor)] = tensor.untyped_storage()  # kept, so that no other gets its place

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        transfer = pl_module.transfer_batch_to_device

        def moved(batch: Any, device: Any, dataloader_idx: int) -> Any:
            found = transfer(batch, device, dataloader_idx)
            if not isinstance(found, Experience):
                return found
            copies = Experience({k: v.clone() if isinstance(v, Tensor) else v for k, v in found.items()})
            self.mark(list(copies.values()))
            # what the batch itself remembers of the host, and nothing else
            twins = found.__dict__.get("twins", {})
            copies.__dict__["twins"] = {name: (copies[name], value) for name, (_, value) in twins.items()}
            return copies

        pl_module.transfer_batch_to_device = moved

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.found.append([])
        self.mark([*pl_module.parameters(), *pl_module.buffers()])
        for network in getattr(pl_module, "frozen", {}).values():
            self.mark(list(network.parameters()))
        self._modes = [Above(self), Below(self)]
        for mode in self._modes:
            mode.__enter__()

    def stop(self) -> None:
        for mode in self._modes[::-1]:
            mode.__exit__(None, None, None)
        self._modes = []
        self.marked.clear()


class Last(Callback):
    """Ends the count of a batch: be the last."""

    def __init__(self, waits: Waits) -> None:
        self.waits = waits

    def on_train_batch_end(self, *args: Any) -> None:
        self.waits.stop()
