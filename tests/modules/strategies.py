"""Strategies by the short names that tests call them by, and what a run under one is measured by."""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor

from lit_palm.models.weights import local
from lit_palm.modules.checkpoint import read_checkpoint

PROCESSES = {"one": 1, "ddp": 2, "sharded": 2, "fsdp1": 2, "tensor": 2, "grid": 4, "four": 4}
ROW_GROUPS = {**PROCESSES, "tensor": 1, "grid": 2}
"""How many processes see different rows."""


class FSDP1(FSDPStrategy):
    """FSDP1 on the CPU: Lightning refuses `FSDPStrategy` itself there, and none that descends from it."""


def strategy(name: str) -> Any:
    """`one`, `ddp`, `sharded` (FSDP2), `fsdp1`, `tensor`, `grid` (FSDP2 x tensor parallel) or `four` (FSDP2)."""
    if name == "fsdp1":
        return FSDP1(state_dict_type="sharded")
    if name in ("sharded", "tensor", "grid", "four"):
        rows = ROW_GROUPS[name]
        return ModelParallelStrategy(data_parallel_size=rows, tensor_parallel_size=PROCESSES[name] // rows)
    return "auto" if name == "one" else name


class Trajectory(Callback):
    """The loss of every optimiser step over all rows, whoever held them, and the norm of its gradient.

    The loss is what the objective returned, summed over processes, over the sum of its weights; with several terms,
    the sum of such quotients. `loss` as logged is a process's own share.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        account = pl_module.account

        def recorded(loss: Any, batch: Any) -> Tensor:
            weight = pl_module.objective.weight(batch)
            terms = loss.total if isinstance(loss.total, dict) else {"": loss.total}
            weights = weight if isinstance(weight, dict) else {"": weight}
            sums = torch.stack([torch.stack([v.detach().double(), weights[k].double()]) for k, v in terms.items()])
            total, count = pl_module.all_sum(sums).unbind(1)
            self.losses.append(float((total / count.clamp(min=1e-8)).sum()))
            return account(loss, batch)  # type: ignore[no-any-return]

        pl_module.account = recorded

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.norms.append(float(trainer.callback_metrics["grad_norm"]))


def saved_weights(path: Path | str) -> dict[str, Tensor]:
    """All weights of a checkpoint, whole, whatever wrote it."""
    return dict(read_checkpoint(path).state_dict)


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory: `VmRSS` now, `VmHWM` the most since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let `VmHWM` start from here, with what is free given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def storage_bytes(tensors: Any) -> int:
    """Bytes behind tensors; what several are views of counts once."""
    storages = (local(t.detach()).untyped_storage() for t in tensors if isinstance(t, Tensor) and not t.is_meta)
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}.values())


def live_bytes() -> int:
    """Bytes behind every tensor that Python knows of."""
    gc.collect()
    tensors = [t for t in gc.get_objects() if issubclass(type(t), Tensor)]
    return storage_bytes(t for t in tensors if type(t) in (Tensor, torch.nn.Parameter))


class Memory(Callback):
    """What a process holds: while it builds its networks, while it samples, and after a step. One file a process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, int] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        build = pl_module.configure_model

        def measured() -> None:
            forget_peak()
            self.found["start"] = start = resident()
            build()
            self.found["peak while building"] = resident("VmHWM") - start

        pl_module.configure_model = measured
        if hasattr(pl_module, "engine"):
            generate = pl_module.engine.generate

            def sampled(*args: Any, **options: Any) -> Any:
                result = generate(*args, **options)
                self.found.setdefault("live while sampling", live_bytes())
                return result

            pl_module.engine.generate = sampled

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found["live before sampling"] = live_bytes()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.found.setdefault("live after sampling", live_bytes())
        forget_peak()
        self.found.setdefault("resident after sampling", resident() - self.found["start"])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        parameters = list(pl_module.networks.parameters())
        frozen = [t for network in getattr(pl_module, "frozen", {}).values() for t in network.parameters()]
        states = [t for state in trainer.optimizers[0].state.values() for t in state.values()]
        self.found |= {
            "parameters": storage_bytes(parameters),
            "gradients": storage_bytes(p.grad for p in parameters if p.grad is not None),
            "optimizer": storage_bytes(states),
            "frozen": storage_bytes(frozen),
        }
        forget_peak()
        self.found["resident"] = resident() - self.found["start"]

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"memory{trainer.global_rank}.json").write_text(json.dumps(self.found))
