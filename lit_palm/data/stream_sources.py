"""Sources that are read while training: their files or shards, and which stream reads which.

A source is a list of files (or of a hub dataset's shards). They are dealt out to a fixed number of streams, each row
to exactly one: whole files as far as they go round, and what remains is cut into as many parts as it takes for every
stream to get the same number.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import fsspec
import numpy as np

from lit_palm.data import sources
from lit_palm.data.sampler import permutation
from lit_palm.data.sources import TextUnit
from lit_palm.data.stream_parts import AnyPart, Found, LinesPart, ParquetPart, Part

__all__ = ["StreamSource", "TextSource", "deal", "hub_identity", "is_hub"]


@dataclass
class TextSource:
    """One source of a mixture."""

    path: str
    """A file, folder, glob, fsspec URL, or a hub dataset (`name` or `name:config`)."""
    weight: float = 1.0
    """Its share of the tokens, relative to the weights of the others."""
    split: str = "train"
    """Split of a hub dataset."""
    text_column: str | None = None
    """The column that holds the text; None: the data module's."""
    name: str | None = None
    """What metrics call it; None: its path."""


class StreamSource(NamedTuple):
    """One source, looked up: the same on every process.

    Attributes:
        name: as it was given.
        split: of a hub dataset.
        files: names of files; None for a hub dataset.
        num_shards: files, or shards of the hub dataset.
        identity: changes when the data may have changed.
    """

    name: str
    split: str
    files: tuple[str, ...] | None
    num_shards: int
    identity: str

    @classmethod
    def look_up(cls, name: str, split: str) -> StreamSource:
        """Find the files or shards of a source.

        Raises:
            ValueError: when there is no such source.
        """
        files = sources._files(name)
        if files is None:
            shards = hub_shards(name, split)
            return cls(name, split, None, int(shards.num_shards), f"{name}:{split}:{hub_identity(name)}")
        fs, _ = sources._open_fs(files[0])
        paths = [sources._open_fs(file)[1] for file in files]
        sizes = [fs.size(path) for path in paths]
        # relative to the folder: data may be read from another place when a run is resumed
        common = paths[0].rpartition("/")[0] if len(paths) == 1 else _common(paths)
        parts = [f"{path.removeprefix(common)}:{size}" for path, size in zip(paths, sizes, strict=True)]
        return cls(name, split, tuple(files), len(files), hashlib.sha256("\n".join(parts).encode()).hexdigest())

    def part(self, shard: int, part: int, parts: int, text_unit: TextUnit) -> Part:
        """One part of a file or shard, in the way of its format."""
        if self.files is None:
            return HubPart(self.name, self.split, shard, part, parts)
        file = self.files[shard]
        suffix = sources._suffix(file)
        if suffix in sources._JSON and not (suffix == ".json" and _is_array(file)):
            return LinesPart(file, part, parts)
        if suffix == ".txt" and text_unit == "line":
            return LinesPart(file, part, parts, text=True)
        if suffix == ".parquet":
            return ParquetPart(file, part, parts)
        return AnyPart(file, self.split, text_unit, part, parts)


def _common(paths: Sequence[str]) -> str:
    first, last = min(paths), max(paths)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length].rpartition("/")[0]


def deal(num_shards: int, num_streams: int, stream: int, seed: int | None) -> list[tuple[int, int, int]]:
    """The parts of a source that a stream reads: (shard, part, parts).

    Over all streams every part is there once, and each stream has the same number of whole shards and of parts.

    Args:
        num_shards: files or shards of the source.
        num_streams: how many streams share them.
        stream: which one.
        seed: chooses who gets what; None: in order.
    """
    order = np.arange(num_shards) if seed is None else permutation(num_shards, seed, 0)
    whole = num_shards // num_streams * num_streams
    mine = [(int(shard), 0, 1) for shard in order[stream:whole:num_streams]]
    rest = order[whole:]
    if len(rest):
        parts = num_streams // math.gcd(len(rest), num_streams)
        units = [(int(shard), part, parts) for shard in rest for part in range(parts)]
        mine += units[stream::num_streams]
    return mine


def _is_array(file: str) -> bool:
    with fsspec.open(file, "rt", encoding="utf-8-sig", compression="infer") as opened:
        return re.match(r"\s*\[", opened.read(100)) is not None


# ---- hub datasets


def is_hub(source: str) -> bool:
    """Whether a source is the name of a hub dataset.

    Raises:
        ValueError: when there is no such source.
    """
    return sources._files(source) is None


@functools.lru_cache(maxsize=64)
def _builder(source: str) -> Any:
    from datasets import load_dataset_builder

    name, _, config = source.partition(":")
    try:
        return load_dataset_builder(name, config or None)
    except Exception as error:
        raise ValueError(
            f"{source}: there is no such file or folder, and no hub dataset of this name could be loaded"
            f" ({type(error).__name__}: {error})"
        ) from error


@functools.lru_cache(maxsize=64)
def hub_shards(source: str, split: str) -> Any:
    """A hub dataset as a stream (`datasets.IterableDataset`), without a copy of it on this machine.

    Raises:
        ValueError: when there is no such dataset or split.
    """
    builder = _builder(source)
    try:
        return builder.as_streaming_dataset(split=split)
    except Exception as error:
        raise ValueError(
            f"{source}: the split {split!r} of this hub dataset could not be loaded ({type(error).__name__}: {error})"
        ) from error


def hub_identity(source: str) -> str:
    """Changes with the hub dataset's revision."""
    builder = _builder(source)
    return f"{builder.config_id}:{builder.hash}"


class HubPart(Part):
    """Every k-th row of a shard of a hub dataset."""

    def __init__(self, name: str, split: str, shard: int, part: int, parts: int) -> None:
        self.name, self.split, self.shard = name, split, shard
        self.part, self.parts = part, parts

    def read(self, place: int) -> Iterator[Found]:
        everything = hub_shards(self.name, self.split)
        rows = everything.shard(everything.num_shards, self.shard)
        iterator = iter(sources._reading(self.name, lambda: rows.skip(place) if place else rows))
        number = place
        while True:
            columns = sources._reading(self.where(number), lambda: next(iterator, None))
            if columns is None:
                return
            if number % self.parts == self.part:
                yield Found(number + 1, number, dict(columns))
            number += 1

    def where(self, number: int) -> str:
        return f"{self.name} ({self.split}), shard {self.shard + 1}, row {number + 1}"
