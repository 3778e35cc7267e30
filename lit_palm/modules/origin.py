"""Where a checkpoint comes from: what its header says of versions, configuration, ranks, data and optimiser."""

from __future__ import annotations

import dataclasses
import inspect
import json
import platform
import re
from typing import TYPE_CHECKING, Any

import lightning
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_palm.version import __version__

if TYPE_CHECKING:
    from lit_palm.modules.host import LitModule

__all__ = ["class_path", "differences", "origin", "parameter_names"]

# what strategies and compilers put between the names of modules
_WRAPPERS = re.compile(r"\b(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|_forward_module)\.")


def class_path(value: Any) -> str:
    """The import path of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def origin(module: LitModule) -> dict[str, Any]:
    """The entries of a module's header that say how it came about; plain data."""
    trainer = module._trainer
    optimizers = trainer.optimizers if trainer is not None else []
    data = getattr(trainer, "datamodule", None)
    return {
        "versions": {
            "lit_palm": __version__,
            "torch": str(torch.__version__),
            "lightning": str(lightning.__version__),
            "python": platform.python_version(),
        },
        "config": module.run_config or {"model": _arguments(module)},
        "world": None if trainer is None else _world(trainer),
        "data": None if data is None else {"class_path": class_path(data), "fingerprint": _fingerprint(data)},
        "objective": {"class_path": class_path(module.objective), "state": module.objective.state_dict()},
        "optimizer": None
        if not optimizers
        else {"class_path": class_path(optimizers[0]), "parameters": parameter_names(module, optimizers)[0]},
    }


def _world(trainer: Any) -> dict[str, Any]:
    strategy = trainer.strategy
    split = strategy.device_mesh["tensor_parallel"].size() if isinstance(strategy, ModelParallelStrategy) else 1
    return {
        "strategy": type(strategy).__name__,
        "ranks": trainer.world_size,
        "nodes": trainer.num_nodes,
        "tensor_parallel": split,
    }


def _fingerprint(data: Any) -> str | None:
    found = getattr(data, "fingerprint", None)
    return found if isinstance(found, str) else None


def _arguments(module: LightningModule) -> dict[str, Any]:
    """The module's arguments, of objects the class with what is plain in it."""
    names = inspect.signature(type(module).__init__).parameters
    kept = {"compile": "_compiles"}  # every Module has a method of that name
    places = {name: kept.get(name, name) for name in names if name != "self"}
    return {name: _plain(getattr(module, place)) for name, place in places.items() if hasattr(module, place)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"class_path": class_path(value), "init_args": _plain(dataclasses.asdict(value))}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    try:
        json.dumps(value)
        return value
    except (TypeError, ValueError):
        return getattr(value, "__qualname__", None) or class_path(value)


def parameter_names(module: LightningModule, optimizers: list[Any]) -> list[list[str]]:
    """Names of each optimiser's parameters, in the order of its groups, which is that of the positions in its state."""
    name_of = {id(p): _WRAPPERS.sub("", name) for name, p in module.named_parameters()}
    return [[name_of.get(id(p), "") for group in o.param_groups for p in group["params"]] for o in optimizers]


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two configurations: "trainer.max_steps 10 -> 20", in the order of the second."""
    one, other = dict(_flat(there)), dict(_flat(here))
    missing = "nothing"
    keys = [*other, *(key for key in one if key not in other)]
    pairs = [(key, one.get(key, missing), other.get(key, missing)) for key in keys]
    return [f"{key} {before} -> {now}" for key, before, now in pairs if before != now]


def _flat(value: Any, key: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [entry for k, v in value.items() for entry in _flat(v, f"{key}.{k}" if key else str(k))]
    return [(key, json.dumps(value, default=str))]
