"""What a checkpoint is on disk, and how a stage takes network and tokeniser from an earlier one.

A checkpoint is a Lightning `.ckpt` file (or a directory, when a sharded strategy wrote it) that loads with
`weights_only=True`. Beside Lightning's own entries it holds

    lit_palm:
        format: 1                                       layout of this dictionary
        version: 0.1.0                                  the lit_palm that wrote it
        versions: {lit_palm, torch, lightning, python}
        config: {...}                                   the run's configuration as plain data
        world: {strategy, ranks}                        what wrote it
        data: {class_path, fingerprint}                 what it was trained on; the position is the data module's state
        optimizer: {class_path, parameters}             names of the parameters, in the order of the optimiser's state
        files: {name: bytes}                            the other files of a folder of shards
        kind: language_model | reward | policy          which module wrote it
        networks: {role: {class_path, init_args}}       role: policy, value or reward (the latter two with `pooling`);
                                                        with LoRA `lora`: rank, targets, ..., and the base's place and
                                                        fingerprint (`lit_palm.modules.adapters`)
        tokenizer: {...}                                everything needed to rebuild the tokeniser and its template
        objective: {class_path, state}                  what the objective carries from step to step
        reference: sha256                               fingerprint of the frozen reference (policies)
        num_tokens: 123456                              tokens trained on so far
        seed: 0                                         what dropout is drawn from

and its `state_dict` has the weights under `networks.{role}.`. The frozen reference and reward models are not in it:
they are read from where they came from; so are frozen weights below LoRA, whose adapters and heads are under
`networks.shared.`. `versions`, `config`, `world`, `data`, `optimizer` and `files` are not in
checkpoints of earlier versions, which load all the same.

An exported folder (`config.json` with the same `networks` and `tokenizer` entries, and `{role}.safetensors`) loads too.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
from dataclasses import dataclass
from typing import Any, Literal

import fsspec
import torch
from torch import Tensor, nn

from lit_palm.data.tokenizers import Tokenizer, tokenizer_from_dict
from lit_palm.foreign import (
    adapter_base,
    adapter_entry,
    adapter_weights,
    fetch,
    foreign_header,
    foreign_weights,
    is_adapter,
    is_foreign,
)
from lit_palm.models.base import Network, NetworkConfig, ScalarNetwork
from lit_palm.modules.layouts import (
    READ_RETRIES,
    check_shards,
    folder_header,
    folder_weights,
    load_file,
    load_shards,
    near,
    open_weights,
)
from lit_palm.modules.safetensors_file import write_safetensors
from lit_palm.modules.storage import is_local, local_path, resolve, retrying

__all__ = [
    "BASE_VARIABLE",
    "FORMAT",
    "Checkpoint",
    "Role",
    "config_from_dict",
    "config_to_dict",
    "consolidate",
    "export_folder",
    "load_checkpoint_tokenizer",
    "read_checkpoint",
    "read_config",
]

FORMAT = 1
BASE_VARIABLE = "LIT_PALM_BASE"
"""Environment variable that says where the frozen weights below LoRA are now."""
Role = Literal["policy", "value", "reward"]


@dataclass
class Checkpoint:
    """A checkpoint as read: its header (`lit_palm`) and the weights by name."""

    path: str
    header: dict[str, Any]
    state_dict: dict[str, Tensor]

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokeniser it carries, or None."""
        data = self.header.get("tokenizer")
        return tokenizer_from_dict(data) if data else None

    def weights(self, role: str) -> dict[str, Tensor]:
        """Weights of one network, without their prefix.

        Raises:
            ValueError: it holds an adapter, and the weights below it are elsewhere.
        """
        if "lora" in self.header.get("networks", {}).get(role, {}):
            raise ValueError(f"{self.path}: holds an adapter as {role}; load_network gives the whole network")
        prefix = f"networks.{role}."
        return {k.removeprefix(prefix): v for k, v in self.state_dict.items() if k.startswith(prefix)}


def config_to_dict(config: NetworkConfig) -> dict[str, Any]:
    """A network's configuration as plain data: `{class_path, init_args}`."""
    assert dataclasses.is_dataclass(config), f"{type(config).__name__} must be a dataclass"
    cls = type(config)
    own = dataclasses.asdict(config)
    for name in own:  # a network around another one holds its configuration
        inner = getattr(config, name)
        own[name] = config_to_dict(inner) if isinstance(inner, NetworkConfig) else own[name]
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": own}


def network_to_dict(network: nn.Module) -> dict[str, Any]:
    """A network's entry in a checkpoint: its configuration, how a scalar head pools, what its adapter stands on."""
    trunk = network.trunk if isinstance(network, ScalarNetwork) else network
    assert isinstance(trunk, Network)
    entry = config_to_dict(trunk.config)
    if isinstance(network, ScalarNetwork):
        entry["pooling"] = network.pooling
    lora = getattr(trunk, "lora", None)
    return entry if lora is None else entry | {"lora": lora}


def config_from_dict(data: dict[str, Any], where: str) -> NetworkConfig:
    """The inverse of `config_to_dict`; imports the class, which must be a NetworkConfig.

    Raises:
        ValueError: the class is not installed, is no network configuration, or refuses the arguments.
    """
    module, _, name = str(data.get("class_path", "")).rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{where}: network {data.get('class_path')!r} is not installed here ({error})") from error
    if not (isinstance(cls, type) and issubclass(cls, NetworkConfig)):
        raise ValueError(f"{where}: {data['class_path']} is not a NetworkConfig; the file is not a lit_palm checkpoint")
    try:
        return cls(**{k: _inner(v, where) for k, v in data.get("init_args", {}).items()})
    except TypeError as error:
        raise ValueError(f"{where}: written by another version of {data['class_path']}: {error}") from error


def _inner(value: Any, where: str) -> Any:
    """An argument of a configuration, which may be the configuration of a network within it."""
    nested = isinstance(value, dict) and value.keys() == {"class_path", "init_args"}
    return config_from_dict(value, where) if nested else value


def read_checkpoint(path: str | os.PathLike[str], header_only: bool = False) -> Checkpoint:
    """Read a checkpoint file, a sharded directory or an exported folder, from disk or any fsspec URL.

    What other tools wrote reads as a checkpoint too: a Hugging Face folder, a GGUF file, a folder of `peft`, or a name
    on the hub.

    Args:
        path: what to read.
        header_only: leave weights out where they are in files of their own.

    Raises:
        ValueError: it does not exist, is not safe to load, is not a lit_palm checkpoint, or has another format.
    """
    path = resolve(path)
    path = fetch(path) or path
    if is_local(path) and is_adapter(local_path(path)):
        return _adapter(local_path(path), header_only)
    if is_local(path) and is_foreign(local_path(path)):
        weights = {} if header_only else dict(foreign_weights(local_path(path)))
        return Checkpoint(local_path(path), foreign_header(local_path(path)), weights)
    filesystem, inner = fsspec.core.url_to_fs(path)
    if not retrying(lambda: filesystem.exists(inner), path, READ_RETRIES):
        raise ValueError(f"checkpoint {path!r} does not exist{near(path)}. Run the stage that writes it first.")
    if retrying(lambda: filesystem.isdir(inner), path, READ_RETRIES):
        if filesystem.exists(f"{inner}/config.json"):
            own = folder_header(path)
            loaded = {"lit_palm": own, "state_dict": {} if header_only else folder_weights(path, own)}
        elif filesystem.exists(f"{inner}/meta.pt"):
            loaded = load_file(f"{path}/meta.pt")
            check_shards(path, loaded.get("lit_palm") or {})
            loaded["state_dict"] = {} if header_only else load_shards(path)["state_dict"]
        else:
            raise ValueError(f"{path}: a directory with neither config.json nor meta.pt is not a checkpoint")
    else:
        loaded = load_file(path)
    header = loaded.get("lit_palm")
    if not isinstance(header, dict):
        raise ValueError(f"{path}: has no `lit_palm` entry, so it was not written by a lit_palm module")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {header.get('format')!r}, written by lit_palm {header.get('version')}; "
            f"this version reads format {FORMAT}. Install the version that wrote it."
        )
    return Checkpoint(path, header, loaded.get("state_dict", {}))


def _adapter(path: str, header_only: bool) -> Checkpoint:
    """A folder of `peft` as a LoRA checkpoint: what it stands on says the network and the tokeniser."""
    entry, base = adapter_entry(path), adapter_base(path)
    header = dict(read_checkpoint(os.environ.get(BASE_VARIABLE) or base, header_only=True).header)
    network = header["networks"].get("policy")
    if network is None:
        raise ValueError(f"{path}: stands on {base}, which is no language model")
    entry["base"] = {"path": base, "role": "policy", "seed": None, "fingerprint": None}
    header |= {"kind": "language_model", "networks": {"policy": network | {"lora": entry}}}
    return Checkpoint(path, header, {} if header_only else dict(adapter_weights(path)))


def load_checkpoint_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokeniser a checkpoint carries.

    Raises:
        ValueError: as `read_checkpoint`, or it carries none.
    """
    tokenizer = read_checkpoint(path, header_only=True).tokenizer
    if tokenizer is None:
        raise ValueError(f"{path}: carries no tokeniser; name one with --data.tokenizer")
    return tokenizer


def read_config(path: str | os.PathLike[str]) -> NetworkConfig:
    """Configuration of the first network of a checkpoint.

    Raises:
        ValueError: as `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path, header_only=True)
    return config_from_dict(next(iter(checkpoint.header["networks"].values())), os.fspath(path))


def export_folder(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> None:
    """Write the networks and tokeniser of a checkpoint as `config.json` and one safetensors file a network.

    Of a checkpoint on disk one tensor at a time is in memory. Adapters are merged into what they stand on.
    `config.json` is written last.

    Raises:
        ValueError: as `read_checkpoint`.
    """
    checkpoint = read_checkpoint(path, header_only=True)
    os.makedirs(folder, exist_ok=True)
    with open_weights(checkpoint.path) as weights:
        for role, entry in checkpoint.header["networks"].items():
            if "lora" in entry:
                from lit_palm.modules.whole import WholeWeights

                merged = WholeWeights(path, role)
                write_safetensors(os.path.join(folder, f"{role}.safetensors"), {name: name for name in merged}, merged)
                continue
            prefix = f"networks.{role}."
            own = {name.removeprefix(prefix): name for name in weights if name.startswith(prefix)}
            write_safetensors(os.path.join(folder, f"{role}.safetensors"), own, weights)
    header = {k: checkpoint.header[k] for k in ("format", "version", "kind", "networks", "tokenizer")}
    header["networks"] = {
        role: {key: value for key, value in entry.items() if key != "lora"}
        for role, entry in header["networks"].items()
    }
    new = os.path.join(folder, ".config.json.tmp")
    with open(new, "w", encoding="utf-8") as file:
        json.dump(header, file, indent=2)
    os.replace(new, os.path.join(folder, "config.json"))


def consolidate(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Put the weights of a folder of shards, or of any checkpoint, together in one place that every stage starts from.

    Args:
        path: the checkpoint.
        target: a folder, which gets what `export_folder` writes, one tensor at a time; or the name of a file that ends
            in `.ckpt`, for whose weights there must be memory. Neither holds the optimiser's state.

    Raises:
        ValueError: as `read_checkpoint`, or the target is the checkpoint itself.
    """
    target = os.fspath(target)
    if os.path.abspath(resolve(path)) == os.path.abspath(resolve(target)):
        raise ValueError(f"{target}: is the checkpoint itself; name another target")
    if not target.endswith(".ckpt"):
        export_folder(path, target)
        return
    checkpoint = read_checkpoint(path)
    header = {k: v for k, v in checkpoint.header.items() if k not in ("files", "optimizer")}
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    new = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.tmp")
    torch.save({"lit_palm": header, "state_dict": checkpoint.state_dict}, new)
    os.replace(new, target)
