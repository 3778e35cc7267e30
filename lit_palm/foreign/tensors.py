"""The tensors of somebody else's files, read one by one: safetensors or what `torch.save` wrote, whole or in shards.

    tensors = open_tensors("folder")            # or a file; a folder's index names its shards
    tensors.shape("model.norm.weight"), tensors["model.norm.weight"]

Opening reads names, shapes and types only, and refuses what is incomplete. A tensor is read when it is asked for, and
one file is open at a time, so that a model of any size can be converted in little memory. Files of `torch.save` are
opened with `weights_only` and mapped into memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Tensors", "open_tensors"]

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

# what a folder may hold its weights in, the preferred first
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, of one or several files.

    Args:
        where: what to call them in errors.
        files: name of a tensor -> the file that holds it, and its name there.
        entries: name of a tensor -> shape and type.
    """

    def __init__(
        self,
        where: str,
        files: Mapping[str, tuple[str, str]],
        entries: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    ) -> None:
        self.where, self.files, self.entries = where, files, entries
        self._open: tuple[str, Any] | None = None

    def __getitem__(self, name: str) -> Tensor:
        path, inner = self.files[name]
        if self._open is None or self._open[0] != path:
            self._open = None  # the file before is let go of, and its pages with it
            self._open = path, _handle(path)
        handle = self._open[1]
        tensor: Tensor = handle[inner] if isinstance(handle, dict) else handle.get_tensor(inner)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self.entries[name][0]

    def dtype(self, name: str) -> torch.dtype:
        """The type of a tensor, without reading it."""
        return self.entries[name][1]

    def renamed(self, names: Mapping[str, str]) -> Tensors:
        """Some of them, under other names: {new: old}."""
        files = {new: self.files[old] for new, old in names.items()}
        return Tensors(self.where, files, {new: self.entries[old] for new, old in names.items()})

    @property
    def nbytes(self) -> int:
        """What all of them take in memory."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.entries.values())


def open_tensors(path: str | os.PathLike[str]) -> Tensors:
    """Open a file of tensors, or a folder of them.

    Args:
        path: a `.safetensors` file, a file of `torch.save`, or a folder with `model.safetensors`, `pytorch_model.bin`
            or the index of either.

    Raises:
        ValueError: nothing is there, a shard is missing or truncated (it is named), or a file cannot be read safely.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise ValueError(f"{path}: does not exist")
    if not os.path.isdir(path):
        found = _entries(path)
        return Tensors(path, {name: (path, name) for name in found}, found)
    for name in _INDEX:
        if os.path.exists(os.path.join(path, name)):
            return _sharded(path, os.path.join(path, name))
    for name in _SINGLE:
        if os.path.exists(os.path.join(path, name)):
            found = _entries(os.path.join(path, name))
            return Tensors(path, {key: (os.path.join(path, name), key) for key in found}, found)
    raise ValueError(f"{path}: the folder holds no weights; one of {', '.join(_SINGLE + _INDEX)} is needed")


def _sharded(folder: str, index: str) -> Tensors:
    try:
        with open(index, encoding="utf-8") as file:
            places = json.load(file)["weight_map"]
        wanted = {str(name): str(shard) for name, shard in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: is no index of shards, which has a `weight_map` of names ({error})") from error
    shards = sorted(set(wanted.values()))
    outside = next((shard for shard in shards if os.path.basename(shard) != shard), None)
    if outside is not None:
        raise ValueError(f"{index}: names {outside!r}, which is not a file of this folder")
    missing = [shard for shard in shards if not os.path.exists(os.path.join(folder, shard))]
    if missing:
        raise ValueError(
            f"{folder}: lacks {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}, {len(missing)} of the "
            f"{len(shards)} shards that its index names: download the folder again"
        )
    entries: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for shard in shards:
        there = _entries(os.path.join(folder, shard))
        lost = next((name for name, place in wanted.items() if place == shard and name not in there), None)
        if lost is not None:
            raise ValueError(f"{os.path.join(folder, shard)}: lacks {lost}, which the index says it holds")
        entries |= {name: there[name] for name, place in wanted.items() if place == shard}
    return Tensors(folder, {name: (os.path.join(folder, shard), name) for name, shard in wanted.items()}, entries)


def _entries(path: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of every tensor in a file."""
    if not path.endswith(".safetensors"):
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in _handle(path).items()}
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"its header is said to have {length} bytes, the file has {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
        unknown = next((str(entry["dtype"]) for entry in header.values() if entry["dtype"] not in _TYPES), None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error
    if end != size:
        raise ValueError(
            f"{path}: is {'truncated' if size < end else 'too long'}, {size} bytes instead of {end}: download it again"
        )
    if unknown is not None:
        raise ValueError(f"{path}: holds tensors of type {unknown}, which cannot be read here")
    return {name: (tuple(entry["shape"]), _TYPES[entry["dtype"]]) for name, entry in header.items()}


def _handle(path: str) -> Any:
    """An open safetensors file, or the dictionary of a file of `torch.save`, mapped into memory."""
    if path.endswith(".safetensors"):
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: cannot be read as safetensors ({error})") from error
    import zipfile

    zipped = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        if not zipped and file.read(2) == b"PK":  # its table of contents is at its end
            raise ValueError(f"{path}: is truncated: copy or download it again")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # the unpickler raises whatever it stumbles over
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: cannot be read safely as a file of tensors ({why}). A pickle can run any code when it is opened, "
            "so only tensors and plain data are read: save the model's state_dict() alone with the tool that made it"
        ) from error
    for key in ("state_dict", "model", "module", "model_state_dict"):  # what trainers wrap a state dict in
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path}: holds a {type(loaded).__name__} without tensors; a state dict is needed")
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
