"""What a checkpoint is on disk, and how a stage takes network and tokeniser from an earlier one.

A checkpoint is a Lightning `.ckpt` file (or a directory, when a sharded strategy wrote it) that loads with
`weights_only=True`. Beside Lightning's own entries it holds

    lit_palm:
        format: 1                                       layout of this dictionary
        version: 0.1.0                                  the lit_palm that wrote it
        kind: language_model | reward | policy          which module wrote it
        networks: {role: {class_path, init_args}}       role: policy, value or reward (the latter two with `pooling`)
        tokenizer: {...}                                everything needed to rebuild the tokeniser and its template
        objective: {class_path, state}                  what the objective carries from step to step
        reference: sha256                               fingerprint of the frozen reference (policies)
        num_tokens: 123456                              tokens trained on so far
        seed: 0                                         what dropout is drawn from

and its `state_dict` has the weights under `networks.{role}.`. The frozen reference and reward models are not in it:
they are read from where they came from.

An exported folder (`config.json` with the same `networks` and `tokenizer` entries, and `{role}.safetensors`) loads too.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import torch
from torch import Tensor, nn

from lit_palm.data.tokenizers import Tokenizer, tokenizer_from_dict
from lit_palm.models.base import Network, NetworkConfig, ScalarNetwork

__all__ = [
    "FORMAT",
    "Checkpoint",
    "Role",
    "config_from_dict",
    "config_to_dict",
    "export_folder",
    "load_checkpoint_tokenizer",
    "read_checkpoint",
    "read_config",
]

FORMAT = 1
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
        """Weights of one network, without their prefix."""
        prefix = f"networks.{role}."
        return {k.removeprefix(prefix): v for k, v in self.state_dict.items() if k.startswith(prefix)}


def config_to_dict(config: NetworkConfig) -> dict[str, Any]:
    """A network's configuration as plain data: `{class_path, init_args}`."""
    assert dataclasses.is_dataclass(config), f"{type(config).__name__} must be a dataclass"
    cls = type(config)
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": dataclasses.asdict(config)}


def network_to_dict(network: nn.Module) -> dict[str, Any]:
    """A network's entry in a checkpoint: its configuration, and how a scalar head pools."""
    if isinstance(network, ScalarNetwork):
        return config_to_dict(network.trunk.config) | {"pooling": network.pooling}
    assert isinstance(network, Network)
    return config_to_dict(network.config)


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
        return cls(**data.get("init_args", {}))
    except TypeError as error:
        raise ValueError(f"{where}: written by another version of {data['class_path']}: {error}") from error


def _load_file(path: str) -> dict[str, Any]:
    with fsspec.open(path, "rb") as file:
        raw = file.read() if "://" in path else None
    try:
        source: Any = io.BytesIO(raw) if raw is not None else path
        loaded = torch.load(
            source, map_location="cpu", weights_only=True, mmap=raw is None and zipfile.is_zipfile(path)
        )
    except Exception as error:  # the unpickler raises whatever it stumbles over
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: not a safe checkpoint ({why}). lit_palm loads whole files of tensors and plain data only; a "
            "pickle from elsewhere can run any code when it is opened: convert it to safetensors with the tool that "
            "made it"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not a lit_palm checkpoint")
    return loaded


def _load_shards(path: str) -> dict[str, Tensor]:
    """A directory of `torch.distributed.checkpoint` shards, as Lightning's sharded strategies write it."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    _load_state_dict(state, storage_reader=FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {k.removeprefix("_forward_module."): v for k, v in state["state_dict"].items()}


def _folder_header(path: str) -> dict[str, Any]:
    try:
        with fsspec.open(f"{path}/config.json", "rt", encoding="utf-8") as file:
            header = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path}/config.json: not JSON ({error})") from error
    if not isinstance(header, dict) or "networks" not in header:
        raise ValueError(f"{path}/config.json: has no `networks`; it is not a folder that lit_palm exported")
    return header


def _folder_weights(path: str, header: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    weights: dict[str, Tensor] = {}
    for role in header["networks"]:
        name = f"{path}/{role}.safetensors"
        try:
            if "://" in name:
                with fsspec.open(name, "rb") as file:
                    tensors = load(file.read())
            else:
                tensors = load_file(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name}: cannot be read as safetensors ({error}); export the checkpoint again") from error
        weights |= {f"networks.{role}.{k}": v for k, v in tensors.items()}
    return weights


def read_checkpoint(path: str | os.PathLike[str], header_only: bool = False) -> Checkpoint:
    """Read a checkpoint file, a sharded directory or an exported folder, from disk or any fsspec URL.

    Args:
        path: what to read.
        header_only: leave weights out where they are in files of their own.

    Raises:
        ValueError: it does not exist, is not safe to load, is not a lit_palm checkpoint, or has another format.
    """
    path = os.fspath(path).rstrip("/")
    filesystem, inner = fsspec.core.url_to_fs(path)
    if not filesystem.exists(inner):
        hint = ""
        parent = Path(path).parent
        if "://" not in path and parent.is_dir():
            found = sorted(str(p) for p in parent.rglob("*.ckpt"))[:5]
            hint = f"; near it are: {', '.join(found)}" if found else ""
        raise ValueError(f"checkpoint {path!r} does not exist{hint}. Run the stage that writes it first.")
    if filesystem.isdir(inner):
        if filesystem.exists(f"{inner}/config.json"):
            own = _folder_header(path)
            loaded = {"lit_palm": own, "state_dict": {} if header_only else _folder_weights(path, own)}
        elif filesystem.exists(f"{inner}/meta.pt"):
            loaded = {**_load_file(f"{path}/meta.pt"), "state_dict": {} if header_only else _load_shards(path)}
        else:
            raise ValueError(f"{path}: a directory with neither config.json nor meta.pt is not a checkpoint")
    else:
        loaded = _load_file(path)
    header = loaded.get("lit_palm")
    if not isinstance(header, dict):
        raise ValueError(f"{path}: has no `lit_palm` entry, so it was not written by a lit_palm module")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path}: checkpoint format {header.get('format')!r}, written by lit_palm {header.get('version')}; "
            f"this version reads format {FORMAT}. Install the version that wrote it."
        )
    return Checkpoint(path, header, loaded["state_dict"])


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
    """Write the networks and tokeniser of a checkpoint as `config.json` and one safetensors file a network."""
    from safetensors.torch import save_file

    checkpoint = read_checkpoint(path)
    os.makedirs(folder, exist_ok=True)
    for role in checkpoint.header["networks"]:
        weights = {k: v.contiguous() for k, v in checkpoint.weights(role).items()}
        save_file(weights, os.path.join(folder, f"{role}.safetensors"), metadata={"format": "pt"})
    header = {k: checkpoint.header[k] for k in ("format", "version", "kind", "networks", "tokenizer")}
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(header, file, indent=2)
