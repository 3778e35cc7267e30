"""Small corpora in shards, and the rows of the global batches that loaders of all ranks give."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_palm.data import StreamingTextData

Row = tuple[int, ...]


def texts(name: str, count: int) -> list[str]:
    return [f"{name}{i} " + "xyz" * (i * i % 7) for i in range(count)]


def shards(folder: Path, name: str, count: int, files: int = 1, suffix: str = ".jsonl") -> str:
    """A folder with `count` documents in so many files; the name of the folder."""
    place = folder / name
    place.mkdir(exist_ok=True)
    rows = [{"id": i, "text": text} for i, text in enumerate(texts(name, count))]
    for file in range(files):
        part = rows[file::files]
        path = place / f"{file:03d}{suffix}"
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(part), path, row_group_size=3)
            continue
        lines = "".join(json.dumps(row) + "\n" for row in part).encode()
        if suffix == ".txt":
            lines = "".join(row["text"] + "\n" for row in part).encode()
        if suffix == ".csv":
            lines = b"id,text\n" + b"".join(f'{row["id"]},"{row["text"]}"\n'.encode() for row in part)
        path.write_bytes(gzip.compress(lines) if suffix.endswith(".gz") else lines)
    return str(place)


def stream(rank: int = 0, ranks: int = 1, **options: Any) -> StreamingTextData:
    """A data module that takes itself for one of several ranks, and nothing for a Trainer."""
    fields: dict[str, Any] = {"tokenizer": "bytes", "sequence_length": 24, "batch_size": 12 // ranks,
                              "num_streams": 4, "shuffle_buffer": 24, "num_workers": 0}  # fmt: skip
    data = StreamingTextData(**{**fields, **options})
    data._ranks = lambda: (rank, ranks)  # type: ignore[method-assign]
    data.setup("fit")
    return data


def rows_of(batch: Any) -> list[Row]:
    assert batch.tokens.shape == batch.mask.shape == batch.loss_mask.shape
    return [tuple(t[m].tolist()) for t, m in zip(batch.tokens, batch.mask, strict=True)]
