"""Where rows come from: files, folders, globs, URLs and the Hugging Face hub, one row at a time.

    for row in read_rows("data/reviews.jsonl"):
        row.where, row.columns     # ("data/reviews.jsonl:1", {"text": "..."})

A source is a file (`.jsonl`, `.json`, `.csv`, `.tsv`, `.parquet`, `.txt`, `.arrow`; `.gz` and the like for JSON), a
folder of such files, a folder written by `Dataset.save_to_disk`, a glob, any of these as an fsspec URL (`s3://...`), or
the name of a hub dataset, `name` or `name:config`. JSON lines and CSV are read line by line, so that an error names its
line, and so that nothing guesses types: every CSV column is text. The other formats and the hub are read by the
`datasets` library. Nothing holds more than a few rows in memory.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any, Literal, NamedTuple

import fsspec

__all__ = ["Row", "TextUnit", "column", "has_splits", "read_rows", "source_fingerprint"]

TextUnit = Literal["line", "paragraph", "document"]

_BUILDERS = {".parquet": "parquet", ".txt": "text", ".arrow": "arrow"}
_JSON = (".jsonl", ".json", ".ndjson")
_CSV = (".csv", ".tsv")
_SUFFIXES = (*_JSON, *_CSV, *_BUILDERS)
_COMPRESSED = (".gz", ".bz2", ".xz")
_HUB_NAME = re.compile(r"^[\w.-]+(/[\w.-]+)?(:[\w.-]+)?$")


class Row(NamedTuple):
    """One row with the place it came from, for messages: "reviews.jsonl:12".

    Rows of one `group` stay on one side of `validation_fraction`; None: the prompt decides.
    """

    where: str
    columns: dict[str, Any]
    group: str | None = None


def column(row: Row, name: str, kind: type | tuple[type, ...] = object) -> Any:
    """A column of a row.

    Raises:
        ValueError: naming file, line and column, when it is missing or of another type.
    """
    value = row.columns.get(name)
    if value is None:
        has = ", ".join(repr(c) for c in row.columns) or "none"
        state = "is null" if name in row.columns else f"is missing (the columns are {has})"
        raise ValueError(f"{row.where}: column {name!r} {state}")
    if not isinstance(value, kind):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f"{row.where}: column {name!r} must be {wanted}, not {type(value).__name__} ({value!r:.60})")
    return value


def read_rows(
    source: str, split: str = "train", *, limit: int | None = None, text_unit: TextUnit = "line", **hub: str
) -> Iterator[Row]:
    """The rows of a source, in order.

    Args:
        source: file, folder, glob, fsspec URL, or hub dataset (`name` or `name:config`).
        split: which split of a hub dataset; files have none.
        limit: stop after this many rows.
        text_unit: what is one row of a `.txt` file.
        hub: what `load_dataset` is told of a hub dataset beside its name, such as `data_dir`.

    Raises:
        ValueError: when there is no such source, it is empty, or a line is not a JSON object; names file and line.
    """
    rows = _read_all(source, split, text_unit, hub)
    empty = True
    for row in islice(rows, limit):
        empty = False
        yield row
    if empty:
        raise ValueError(f"{source}: there are no rows in it" + ("" if limit is None else f" (limit={limit})"))


def _read_all(source: str, split: str, text_unit: TextUnit, hub: dict[str, str]) -> Iterator[Row]:
    files = _files(source)
    if files is None:
        return _from_hub(source, split, hub)
    return (row for file in files for row in _from_file(file, split, text_unit))


def source_fingerprint(source: str, split: str, **hub: str) -> str:
    """Changes when the data may have changed: names, sizes and times of files, or the hub's revision.

    Raises:
        ValueError: when there is no such source.
    """
    files = _files(source)
    if files is None:
        return f"{source}:{split}:{_load_hub(source, split, hub)._fingerprint}"
    parts = []
    for name in files:
        fs, path = _open_fs(name)
        if fs.isdir(path):
            parts += [f"{name}:{fs.ukey(p)}" for p in sorted(fs.find(path))]
        elif "file" in fs.protocol:
            info = fs.info(path)
            parts.append(f"{path}:{info['size']}:{info['mtime']}")
        else:
            parts.append(f"{name}:{fs.ukey(path)}")
    return hashlib.sha256("\n".join([split, *parts]).encode()).hexdigest()


def has_splits(source: str) -> bool:
    """Whether a source comes in splits: a hub dataset, or a folder with several written by `save_to_disk`.

    Raises:
        ValueError: when there is no such source.
    """
    files = _files(source)
    if files is None:
        return True
    fs, path = _open_fs(files[0])
    return bool(fs.exists(f"{path}/dataset_dict.json"))


def _open_fs(name: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(name)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{name}: files of this kind cannot be opened here ({error})") from error


def _files(source: str) -> list[str] | None:
    """The files a source names, None when it can only be a hub dataset."""
    if not source:
        raise ValueError("a data source is an empty string; name a file, folder, glob, URL or hub dataset")
    fs, path = _open_fs(source)
    if fs.isdir(path):
        return _folder(source, fs, path)
    if fs.exists(path):
        return [source]
    if any(c in path for c in "*?["):
        found = [fs.unstrip_protocol(p) if "://" in source else p for p in sorted(fs.glob(path))]
        if not found:
            raise ValueError(f"{source}: no file matches this glob")
        return found
    if "://" in source or _suffix(path) or not _HUB_NAME.match(source):
        raise ValueError(f"{source}: there is no such file")
    return None


def _folder(source: str, fs: Any, path: str) -> list[str]:
    if fs.exists(f"{path}/state.json") or fs.exists(f"{path}/dataset_dict.json"):
        return [source]  # written by datasets' save_to_disk
    found = [p for p in sorted(fs.find(path)) if _suffix(p) and not p.rsplit("/", 1)[-1].startswith(".")]
    if not found:
        raise ValueError(f"{source}: no data file in this folder ({', '.join(_SUFFIXES)})")
    return [fs.unstrip_protocol(p) if "://" in source else p for p in found]


def _suffix(path: str) -> str:
    """`.jsonl` for a.jsonl and a.jsonl.gz; empty for what is no data file."""
    for ending in _COMPRESSED:
        path = path.removesuffix(ending)
    return next((s for s in _SUFFIXES if path.endswith(s)), "")


def _from_file(name: str, split: str, text_unit: TextUnit) -> Iterator[Row]:
    suffix = _suffix(name)
    if suffix in _JSON:
        return _from_json(name)
    if suffix in _CSV:
        return _from_csv(name, suffix)
    if suffix:
        return _from_builder(name, suffix, text_unit)
    fs, path = _open_fs(name)
    if fs.isdir(path):
        return _from_saved(name, split)
    raise ValueError(f"{name}: this is no data file; its name must end in {', '.join(_SUFFIXES)}")


def _from_json(name: str) -> Iterator[Row]:
    if _suffix(name) == ".json":
        with fsspec.open(name, "rt", encoding="utf-8-sig", compression="infer") as file:
            if re.match(r"\s*\[", file.read(100)):
                file.seek(0)
                yield from _from_array(name, file.read())
                return
    for number, line in _lines(name):
        if line.strip():
            where = f"{name}:{number}"
            yield Row(where, _parse(where, line))


def _lines(name: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, perhaps compressed; line breaks inside are kept as they are."""
    number = 0
    try:
        with fsspec.open(name, "rt", encoding="utf-8-sig", compression="infer", newline="") as file:
            for number, line in enumerate(file, 1):
                yield number, line
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: this file is not UTF-8 text after line {number} ({error})") from error
    except (OSError, EOFError) as error:
        raise ValueError(f"{name}: this file cannot be read after line {number} ({error})") from error


def _from_csv(name: str, suffix: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    delimiter = "\t" if suffix == ".tsv" else ","
    reader = csv.DictReader((line for _, line in _lines(name)), delimiter=delimiter, strict=True)
    while True:
        try:
            columns = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{name}:{reader.line_num}: this line is not CSV ({error})") from error
        if columns is None:
            return
        where = f"{name}:{reader.line_num}"
        if None in columns or None in columns.values():
            raise ValueError(f"{where}: this line has another number of columns than the header")
        yield Row(where, columns)


def _from_array(name: str, text: str) -> Iterator[Row]:
    try:
        items = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name}: this file is not JSON ({error})") from error
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise ValueError(f"{name}, item {number}: each item must be a JSON object")
        yield Row(f"{name}, item {number}", item)


def _parse(where: str, line: str) -> dict[str, Any]:
    try:
        columns = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: this line is not JSON ({error})") from error
    if not isinstance(columns, dict):
        raise ValueError(f"{where}: this line is JSON but no object; write one {{...}} on each line")
    return columns


def _from_builder(name: str, suffix: str, text_unit: TextUnit) -> Iterator[Row]:
    from datasets import load_dataset

    options: dict[str, Any] = {}
    if suffix == ".txt":
        options["sample_by"] = text_unit
    fs, path = _open_fs(name)
    if fs.size(path) == 0:
        return
    # streaming: rows come straight from the file, without a second copy of it in datasets' cache
    kind = _BUILDERS[suffix]
    rows = _reading(name, lambda: load_dataset(kind, data_files=[name], split="train", streaming=True, **options))
    iterator = iter(rows)
    for number in count(1):
        columns = _reading(name, lambda: next(iterator, None))
        if columns is None:
            return
        by_line = suffix == ".txt" and text_unit == "line"
        yield Row(f"{name}:{number}" if by_line else f"{name}, row {number}", dict(columns))


def _reading(name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # pyarrow, pandas and datasets raise what they like
        raise ValueError(f"{name}: this file cannot be read ({type(error).__name__}: {error})") from error


def _from_saved(name: str, split: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    data = _reading(name, lambda: load_from_disk(name))
    if isinstance(data, DatasetDict):
        if split not in data:
            raise ValueError(f"{name}: there is no split {split!r}; it has {', '.join(data)}")
        data = data[split]
    for number, columns in enumerate(data, 1):
        yield Row(f"{name}, row {number}", dict(columns))


def _from_hub(source: str, split: str, hub: dict[str, str]) -> Iterator[Row]:
    for number, columns in enumerate(_load_hub(source, split, hub), 1):
        yield Row(f"{source} ({split}), row {number}", dict(columns))


def _load_hub(source: str, split: str, hub: dict[str, str] | None = None) -> Any:
    from datasets import load_dataset

    name, _, config = source.partition(":")
    try:
        return load_dataset(name, config or None, split=split, **(hub or {}))
    except Exception as error:
        raise ValueError(
            f"{source}: there is no such file or folder, and the split {split!r} of a hub dataset of this name could"
            f" not be loaded ({type(error).__name__}: {error})"
        ) from error
