"""Resuming from any checkpoint under any strategy: other numbers of ranks, files and folders of shards, URLs, aliases.

Lightning restores a file on one device or under DDP, and a folder of shards under the strategy that wrote it. `install`
puts the rest in between, on the strategy's own two methods, so that it works for `Trainer.fit` and the command line:

    written as             one device, DDP                  a strategy that shards
    a file                 Lightning                        here: each rank takes its part
    a folder of shards     here: put together in memory     here: each rank reads its part, of any number of shards

A file keeps the optimiser's state by the position of each parameter, a folder by its name. A strategy that shards takes
positions for those of `module.parameters()`, which is wrong as soon as there are parameter groups, so the names are
kept in the checkpoint, and used wherever one form becomes the other.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.optim import Optimizer

from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.modules.compatibility import check_optimizer
from lit_palm.modules.layouts import load_file, load_shards, shard_reader
from lit_palm.modules.origin import parameter_names
from lit_palm.modules.storage import resolve

__all__ = ["install"]


def install(trainer: Trainer, check: Callable[[dict[str, Any]], Any]) -> None:
    """Let a trainer's strategy resume from every kind of checkpoint; once a run, before it restores.

    Args:
        trainer: about to run.
        check: takes a checkpoint's header and raises ValueError where it does not fit; called before weights are read.
    """
    strategy: Any = trainer.strategy
    kind = type(strategy)
    shards = isinstance(strategy, ModelParallelStrategy | FSDPStrategy)
    header: dict[str, Any] = {}

    def load_checkpoint(checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = resolve(strategy.broadcast(checkpoint_path))
        if not shards and not _is_folder(path):
            loaded: dict[str, Any] = kind.load_checkpoint(strategy, path, weights_only=weights_only)
        else:
            header.update(read_checkpoint(path, header_only=True).header)  # or the reason why it cannot be resumed
            if shards:
                check(header)
                loaded = _load_sharded(trainer, path, header)
            else:
                loaded = _load_whole(path)
        header.update(loaded.get("lit_palm") or {})
        if trainer.state.fn == "fit" and "lit_palm" in loaded and "loops" not in loaded:
            raise ValueError(_WEIGHTS_ONLY.format(path))
        return loaded

    def load_optimizer_state_dict(checkpoint: dict[str, Any]) -> None:
        names = parameter_names(trainer.lightning_module, trainer.optimizers)
        states = [
            _by_position(state, own, optimizer) if _is_named(state) else state
            for optimizer, state, own in zip(trainer.optimizers, checkpoint["optimizer_states"], names, strict=True)
        ]
        check_optimizer(header, trainer.optimizers)
        kind.load_optimizer_state_dict(strategy, checkpoint | {"optimizer_states": states})

    strategy.load_checkpoint = load_checkpoint
    if not shards:
        strategy.load_optimizer_state_dict = load_optimizer_state_dict


_WEIGHTS_ONLY = (
    "{}: holds weights only, so there is no run to go on with; start a new one from them with --model.network"
)


def _is_folder(path: str) -> bool:
    filesystem, inner = fsspec.core.url_to_fs(path)
    return bool(filesystem.isdir(inner))


def _meta(path: str) -> dict[str, Any]:
    filesystem, inner = fsspec.core.url_to_fs(path)
    if not filesystem.exists(f"{inner}/meta.pt"):
        raise ValueError(_WEIGHTS_ONLY.format(path))  # an exported folder
    return load_file(f"{path}/meta.pt")


def _load_whole(path: str) -> dict[str, Any]:
    """A folder of shards, as Lightning expects a checkpoint from a file."""
    loaded = _meta(path)
    parts = load_shards(path, ("state_dict", "model", "optimizer_0"))
    loaded["state_dict"] = parts["state_dict"]
    loaded["optimizer_states"] = [parts["optimizer_0"]] if "optimizer_0" in parts else []
    return loaded


def _load_sharded(trainer: Trainer, path: str, header: dict[str, Any]) -> dict[str, Any]:
    """Fill this rank's part of the model and of the optimiser; returns the rest."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    model: Any = trainer.strategy.model
    optimizers = trainer.optimizers if trainer.state.fn == "fit" else []
    check_optimizer(header, optimizers)
    if not _is_folder(path):
        loaded = load_file(path)
        if "optimizer_states" not in loaded and optimizers:
            raise ValueError(_WEIGHTS_ONLY.format(path))
        # every rank maps the file and takes its part, so nothing is sent
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, loaded.pop("state_dict"), options=options)
        recorded = (header.get("optimizer") or {}).get("parameters")
        names = [recorded] if recorded else parameter_names(trainer.lightning_module, optimizers)
        for optimizer, state, own in zip(optimizers, loaded.pop("optimizer_states", []), names, strict=False):
            set_optimizer_state_dict(model, optimizer, _by_name(state, own), options=options)
        return loaded
    meta = _meta(path)
    # flattened, parameters of which FSDP1 leaves this rank nothing would not be asked for, which torch takes for a sign
    # of a checkpoint of its version 2.3
    planner = partial(DefaultLoadPlanner, flatten_sharded_tensors=False)
    reader = shard_reader(path)
    keys = {key.partition(".")[0] for key in reader.read_metadata().state_dict_metadata}
    key = "model" if "model" in keys else "state_dict"
    weights = {key: get_model_state_dict(model)}
    dcp.load(weights, storage_reader=reader, planner=planner())
    set_model_state_dict(model, weights[key])
    for number, optimizer in enumerate(optimizers):
        state = {f"optimizer_{number}": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, storage_reader=shard_reader(path), planner=planner())
        set_optimizer_state_dict(model, optimizer, state[f"optimizer_{number}"])
    return meta


def _is_named(state: dict[str, Any]) -> bool:
    return any(isinstance(p, str) for group in state["param_groups"] for p in group["params"])


def _by_name(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimiser's state with names for positions."""
    order = [position for group in state["param_groups"] for position in group["params"]]
    if len(order) != len(names):
        raise ValueError(
            f"the checkpoint to resume has {len(order)} parameters in its optimiser, this run {len(names)}: it was "
            "written with other trained weights"
        )
    name_of = dict(zip(order, names, strict=True))
    return {
        "state": {name_of[position]: value for position, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [name_of[position] for position in group["params"]]} for group in state["param_groups"]
        ],
    }


def _by_position(state: dict[str, Any], names: list[str], optimizer: Optimizer) -> dict[str, Any]:
    """An optimiser's state with positions for names, in the groups of this run's optimiser."""
    group_of = {name: group for group in state["param_groups"] for name in group["params"]}
    lost = sorted(set(names) - group_of.keys())
    if lost:
        raise ValueError(
            f"the checkpoint to resume has no optimiser state for {', '.join(lost[:3])}: it was written with other "
            "trained weights"
        )
    groups, first = [], 0
    for group in optimizer.param_groups:
        own = range(first, first + len(group["params"]))
        options = {k: v for k, v in group_of[names[first]].items() if k != "params"} if own else dict(group)
        groups.append({**options, "params": list(own)})
        first += len(own)
    values = {position: state["state"][name] for position, name in enumerate(names) if name in state["state"]}
    return {"state": values, "param_groups": groups}
