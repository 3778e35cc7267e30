"""Where a reader's rows are: the hub with everything `load_dataset` must be told, or what somebody copied from there.

A folder that holds what the hub's repository does (`git clone`, `huggingface-cli download`) is read split by split, by
the rules that `datasets` finds splits with: `train.jsonl.gz`, `data/test_prefs-00000-of-00001.parquet`, `train/x.json`.
Files are then read as any other source, so that an error names the line.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from lit_palm.data import sources
from lit_palm.data.sources import Row

__all__ = ["Hub", "open_rows", "place_fingerprint", "place_has_splits"]


class Hub(NamedTuple):
    """A dataset of the hub.

    Args:
        name: "owner/name".
        config: its configuration.
        data_dir: the folder of the repository that is read.
        data_files: the file or glob that is read.
        revision: the branch, where it is not `main`.
    """

    name: str
    config: str | None = None
    data_dir: str | None = None
    data_files: str | None = None
    revision: str | None = None

    def options(self, source: str) -> dict[str, Any]:
        """What `load_dataset` is told beside the name and configuration of a source."""
        named = {"data_dir": self.data_dir, "data_files": self.data_files}
        if source.partition(":")[0] == self.name:
            named["revision"] = self.revision
        return {key: value for key, value in named.items() if value is not None}

    def full(self, source: str) -> str:
        """The source with the configuration, where it names none: "openai/gsm8k:main"."""
        return source if ":" in source or self.config is None else f"{source}:{self.config}"


def open_rows(hub: Hub, source: str, split: str, limit: int | None) -> Iterator[Row]:
    """The rows of a split.

    Args:
        hub: where the dataset is.
        source: its name, or another dataset's of the same layout, or a file, folder, glob or URL.
        split: the dataset's own name of it; a file has none.
        limit: stop after this many rows.

    Raises:
        ValueError: when there is no such source or split, or no row in it.
    """
    files = sources._files(source)
    if files is None:
        return sources.read_rows(hub.full(source), split, limit=limit, **hub.options(source))
    split_files = _splits(hub, source)
    if split_files is None:
        return sources.read_rows(source, split, limit=limit)
    return islice(_each(_of(source, split_files, split)), limit)


def _each(files: list[str]) -> Iterator[Row]:
    for file in files:
        yield from sources.read_rows(file)


def place_has_splits(hub: Hub, source: str) -> bool:
    """Whether a source comes in splits."""
    if sources._files(source) is None or sources.has_splits(source):
        return True
    return _splits(hub, source) is not None


def place_fingerprint(hub: Hub, source: str, split: str) -> str:
    """Changes when the rows of a split may have changed."""
    if sources._files(source) is None:
        return sources.source_fingerprint(hub.full(source), split, **hub.options(source))
    split_files = _splits(hub, source)
    if split_files is None:
        return sources.source_fingerprint(source, split)
    return "\n".join(sources.source_fingerprint(file, split) for file in _of(source, split_files, split))


def _of(source: str, split_files: dict[str, list[str]], split: str) -> list[str]:
    if split not in split_files:
        raise ValueError(f"{source}: there is no split {split!r} in this folder; it has {', '.join(split_files)}")
    return split_files[split]


def _splits(hub: Hub, source: str) -> dict[str, list[str]] | None:
    """The files of each split of a copied repository; None for any other source."""
    fs, path = sources._open_fs(source)
    if "file" not in fs.protocol or not fs.isdir(path) or sources._files(source) == [source]:
        return None
    from datasets.data_files import DataFilesDict, get_data_patterns

    part = next((p for p in (hub.data_dir, hub.config) if p is not None and fs.isdir(f"{path}/{p}")), None)
    if part is None and hub.data_dir is not None and not any(map(sources._suffix, fs.ls(path, detail=False))):
        raise ValueError(f"{source}: there is no folder {hub.data_dir!r} in it, and no data file")
    path = path if part is None else f"{path}/{part}"
    patterns = get_data_patterns(path)
    if part is None and list(patterns.values()) == [["**"]]:  # nothing is named after a split
        return None
    found = DataFilesDict.from_patterns(patterns, base_path=path)
    readable = {str(split): [str(f) for f in files if sources._suffix(str(f))] for split, files in found.items()}
    return {split: files for split, files in readable.items() if files} or None
