"""The cache of tokenised data: columns of numbers in flat files, found again by what they were made from.

An entry is a folder named by the sha256 of its key (source fingerprint, tokenizer fingerprint, arguments, format). It
is written beside its place and renamed when complete, so an interrupted run leaves nothing half done and several
processes may build the same entry. Arrays are memory-mapped when read: a corpus need not fit into memory.

    columns = cached(folder, {"source": ..., "tokenizer": ...}, build)   # build(writer) runs only if there is no entry
    columns.arrays["tokens"]
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from numpy.typing import DTypeLike, NDArray

__all__ = ["ColumnWriter", "Columns", "Records", "cached"]

FORMAT = 1  # raise it when what is written changes its meaning
_PENDING = 2**20  # values of a column that wait in memory to be written together
_BLOCK = 2**24  # bytes that are looked through at a time


class ColumnWriter:
    """Appends to the columns of a new entry.

    Attributes:
        meta: plain values that are saved with the entry.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = {}
        self._columns: dict[str, np.dtype[Any]] = {}
        self._pending: dict[str, list[Any]] = {}
        self._records: list[str] = []

    def append(self, name: str, values: Iterable[Any], dtype: DTypeLike) -> None:
        """Append numbers to a column; a column has one dtype."""
        self._columns.setdefault(name, np.dtype(dtype))
        self._pending.setdefault(name, []).extend(values)
        if len(self._pending[name]) > _PENDING:
            self._flush(name)

    def append_record(self, record: dict[str, Any]) -> None:
        """Append one record of JSON values."""
        self._records.append(json.dumps(record, ensure_ascii=False, default=str) + "\n")
        if len(self._records) > _PENDING // 100:
            self._flush_records()

    def _flush(self, name: str) -> None:
        with open(self.folder / f"{name}.bin", "ab") as file:
            np.asarray(self._pending[name], dtype=self._columns[name]).tofile(file)
        self._pending[name] = []

    def _flush_records(self) -> None:
        with open(self.folder / "records.jsonl", "a", encoding="utf-8") as file:
            file.writelines(self._records)
        self._records = []

    def close(self) -> None:
        """Write what is left and the description of the columns."""
        for name in self._columns:
            self._flush(name)
        self._flush_records()
        columns = {name: kind.name for name, kind in self._columns.items()}
        (self.folder / "entry.json").write_text(json.dumps({"columns": columns, "meta": self.meta}), encoding="utf-8")


class Columns:
    """A finished entry.

    Attributes:
        arrays: name -> [n] memory-mapped numbers.
        records: the records, in order, read when they are asked for.
        meta: the plain values.
    """

    def __init__(self, folder: Path) -> None:
        entry = json.loads((folder / "entry.json").read_text(encoding="utf-8"))
        self.meta: dict[str, Any] = entry["meta"]
        self.arrays: dict[str, NDArray[Any]] = {}
        for name, kind in entry["columns"].items():
            path = folder / f"{name}.bin"
            empty = path.stat().st_size == 0  # which cannot be mapped
            self.arrays[name] = np.empty(0, kind) if empty else np.memmap(path, dtype=kind, mode="r")
        self.records = Records(folder / "records.jsonl")

    def fingerprint(self) -> str:
        """sha256 of the columns' names, lengths and a sample of their values: the same content, wherever it lies."""
        digest = hashlib.sha256(f"{len(self.records)}".encode())
        for name, array in sorted(self.arrays.items()):
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            for part in (array[:4096], array[:: max(len(array) // 4096, 1)], array[-4096:]):
                digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


class Records(Sequence[dict[str, Any]]):
    """The records of an entry, each read from the mapped file when it is asked for: ten million are 80 MB of offsets,
    where as objects they would be several GB in every process."""

    def __init__(self, path: Path) -> None:
        empty = path.stat().st_size == 0  # which cannot be mapped
        self._bytes: NDArray[np.uint8] = np.empty(0, np.uint8) if empty else np.memmap(path, np.uint8, mode="r")
        starts = range(0, len(self._bytes), _BLOCK)
        ends = [np.flatnonzero(self._bytes[start : start + _BLOCK] == ord("\n")) + start + 1 for start in starts]
        self._offsets = np.concatenate([[0], *ends])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return json.loads(self._bytes[self._offsets[index] : self._offsets[index + 1]].tobytes())


def cached(folder: Path, key: dict[str, Any], build: Callable[[ColumnWriter], None], what: str) -> Columns:
    """The entry for `key`, built if there is none.

    Args:
        folder: where entries are kept.
        key: JSON values that the content depends on.
        build: writes the content.
        what: what it is, for the log.
    """
    digest = hashlib.sha256(json.dumps({"format": FORMAT, **key}, sort_keys=True).encode()).hexdigest()[:32]
    place = folder / digest
    if (place / "entry.json").exists():
        rank_zero_info(f"{what}: taken from the cache ({place})")
        return Columns(place)
    rank_zero_info(f"{what}: not in the cache yet, preparing it ({place})")
    new = folder / f"{digest}.{uuid.uuid4().hex}.part"
    new.mkdir(parents=True)
    writer = ColumnWriter(new)
    try:
        build(writer)
        writer.close()
        try:
            new.rename(place)
        except OSError:  # another process was faster: its entry is the same
            if not (place / "entry.json").exists():
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return Columns(place)
