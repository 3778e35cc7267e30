"""The ways a checkpoint lies on disk: one file, a folder of shards, an exported folder; each also behind a URL.

A folder of shards is what `torch.distributed.checkpoint` writes, one file a rank and `.metadata`, with everything that
is no weight or optimiser state in `meta.pt`. Its weights are under `state_dict` (`ModelParallelStrategy`) or `model`
(`FSDPStrategy`), its optimiser's state under `optimizer_0`, by the parameters' names. `meta.pt` is written last, and
lists the other files with their sizes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import torch
from torch import Tensor

from lit_palm.foreign import adapter_weights, foreign_weights, is_adapter, is_foreign
from lit_palm.modules.storage import Place, is_local, local_path, retrying
from lit_palm.parallel.tensor import Joined

__all__ = [
    "READ_RETRIES",
    "check_shards",
    "folder_header",
    "folder_weights",
    "load_file",
    "load_shards",
    "near",
    "open_weights",
    "shard_reader",
]

READ_RETRIES = 4
"""How often reading from a URL is tried again after a transient error."""


def load_file(path: str) -> dict[str, Any]:
    """The dictionary in a file that `torch.save` wrote.

    Raises:
        ValueError: it is no such file, holds something else, or anything that could run code.
    """
    remote = not is_local(path)
    raw = retrying(lambda: _read(path), path, READ_RETRIES) if remote else None
    try:
        source: Any = io.BytesIO(raw) if raw is not None else local_path(path)
        mapped = raw is None and zipfile.is_zipfile(source)
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
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


def _read(path: str) -> bytes:
    with fsspec.open(path, "rb") as file:
        return bytes(file.read())


def shard_reader(path: str) -> Any:
    """What `torch.distributed.checkpoint` reads a folder of shards with."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader

    return FileSystemReader(local_path(path)) if is_local(path) else FsspecReader(path)


def load_shards(path: str, prefixes: tuple[str, ...] = ("state_dict", "model")) -> dict[str, Any]:
    """A folder of shards, put together in memory.

    Args:
        path: the folder.
        prefixes: which parts; `optimizer_0` is the optimiser.

    Returns:
        The parts, with the weights as `state_dict` whatever they are called in the folder.
    """
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner(keys=set(prefixes))
    _load_state_dict(state, storage_reader=shard_reader(path), planner=planner, no_dist=True)
    if "model" in state:
        state["state_dict"] = state.pop("model")
    if "state_dict" in state:
        weights = {k.removeprefix("_forward_module."): v for k, v in state["state_dict"].items()}
        state["state_dict"] = dict(Joined(weights))
    return state


def check_shards(path: str, header: dict[str, Any]) -> None:
    """Look whether every file of a folder of shards is there, whole; only their sizes are read.

    Args:
        path: the folder.
        header: the `lit_palm` entry of its `meta.pt`.

    Raises:
        ValueError: naming the file, and how many ranks wrote them.
    """
    folder, _, name = path.rpartition("/")
    there = Place(folder or ".", READ_RETRIES).sizes(name)
    expected: dict[str, int] = header.get("files") or {}
    exact = bool(expected)
    ranks = (header.get("world") or {}).get("ranks")
    if not expected and ".metadata" in there:  # written by Lightning, which keeps no list
        expected = _sizes(path)
        ranks = ranks or max((int(m[1]) + 1 for name in expected if (m := re.match(r"__(\d+)_", name))), default=1)
    lost = sorted((expected.keys() | {".metadata"}) - there.keys())
    short = sorted(
        name
        for name, size in expected.items()
        if name in there and (there[name] != size if exact else there[name] < size)
    )
    writers = f"{ranks or 'an unknown number of'} rank{'' if ranks == 1 else 's'} wrote {len(expected) or 'its'} files"
    if lost or short:
        faulty = lost or short
        names = ", ".join(faulty[:5]) + (f" and {len(faulty) - 5} more" if len(faulty) > 5 else "")
        state = "is missing" if lost else f"holds {there[short[0]]} bytes instead of {expected[short[0]]}"
        raise ValueError(
            f"{path}: {names} {state}, and {writers}, all of which are needed: copy the folder again from where it was "
            "written, or use another checkpoint"
        )


def _sizes(path: str) -> dict[str, int]:
    """Files of a folder of shards, with the bytes that each must have at least, by its own index."""
    sizes: dict[str, int] = {}
    for info in shard_reader(path).read_metadata().storage_data.values():
        sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
    return sizes


def folder_header(path: str) -> dict[str, Any]:
    """The header of an exported folder.

    Raises:
        ValueError: its `config.json` is not one that lit_palm wrote.
    """
    try:
        with fsspec.open(f"{path}/config.json", "rt", encoding="utf-8") as file:
            header = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path}/config.json: not JSON ({error})") from error
    if not isinstance(header, dict) or "networks" not in header:
        raise ValueError(f"{path}/config.json: has no `networks`; it is not a folder that lit_palm exported")
    return header


def folder_weights(path: str, header: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of an exported folder, under their names in a checkpoint.

    Raises:
        ValueError: a network's file is missing or broken.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    weights: dict[str, Tensor] = {}
    for role in header["networks"]:
        name = f"{path}/{role}.safetensors"
        try:
            tensors = load_file(local_path(name)) if is_local(name) else load(_read(name))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name}: cannot be read as safetensors ({error}); export the checkpoint again") from error
        weights |= {f"networks.{role}.{k}": v for k, v in tensors.items()}
    return weights


def near(path: str) -> str:
    """Checkpoints near a path that does not exist, for the error; "" when there are none."""
    parent = Path(local_path(path)).parent
    if not is_local(path) or not parent.is_dir():
        return ""
    found = sorted(str(p) for p in parent.rglob("*.ckpt"))[:5]
    return f"; near it are: {', '.join(found)}" if found else ""


class _LazyShards(Mapping[str, Tensor]):
    """The weights of a folder of shards, each put together when it is asked for."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._keys: dict[str, str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for key, stored in shard_reader(path).read_metadata().state_dict_metadata.items():
            part, _, name = key.partition(".")
            if part in ("state_dict", "model"):
                self._keys[name.removeprefix("_forward_module.")] = key
                self._shapes[name.removeprefix("_forward_module.")] = tuple(getattr(stored, "size", ()))

    def __getitem__(self, name: str) -> Tensor:
        loaded: Tensor = load_shards(self._path, (self._keys[name],))["state_dict"][name]
        return loaded

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight."""
        return self._shapes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@contextmanager
def open_weights(path: str) -> Iterator[Mapping[str, Tensor]]:
    """The weights of a checkpoint by name, read when they are asked for where they are on a disk."""
    filesystem, inner = fsspec.core.url_to_fs(path)
    if is_local(path) and is_adapter(local_path(path)):
        yield adapter_weights(local_path(path))
    elif is_local(path) and is_foreign(local_path(path)):
        yield foreign_weights(local_path(path))
    elif not filesystem.isdir(inner):
        yield load_file(path)["state_dict"]  # a file on a disk is mapped into memory
    elif filesystem.exists(f"{inner}/meta.pt"):
        yield Joined(_LazyShards(path))
    else:
        yield folder_weights(path, folder_header(path))  # mapped too
