"""A stream of text read, tokenised, shuffled and packed, beside `datasets`' own streaming doing the same work."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lit_palm.data import BPETokenizer, StreamingTextData
from tests.benchmarks.worker import Work

LENGTH, BATCH, BUFFER, FILES = 1024, 16, 256, 8


def corpus(folder: Path, documents: int) -> str:
    """Parquet shards of documents of 20 to 800 words, from a vocabulary of 20,000."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=choose.randint(2, 9))) for _ in range(20_000)]
    for file in range(FILES):
        texts = [" ".join(choose.choices(words, k=choose.randint(20, 800))) for _ in range(documents // FILES)]
        pq.write_table(pa.table({"text": texts}), folder / f"{file}.parquet", row_group_size=500)
    return str(folder)


def ours(source: str, tokenizer: Any, workers: int) -> Iterator[torch.Tensor]:
    data = StreamingTextData(
        train=source, tokenizer=tokenizer, sequence_length=LENGTH, batch_size=BATCH, num_streams=8,
        shuffle_buffer=BUFFER, num_workers=workers,
    )  # fmt: skip
    data.setup("fit")
    for batch in data.train_dataloader():
        yield batch["mask"]


def datasets(source: str, tokenizer: Any, workers: int) -> Iterator[torch.Tensor]:
    """Packs as is usual with it, by cutting the tokens of concatenated documents: less work than whole documents."""
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    def pack(rows: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer.encode_batch(rows["text"])
        flat = [i for document in ids for i in (tokenizer.bos_id, *document, tokenizer.eos_id)]
        return {"tokens": [flat[i : i + LENGTH] for i in range(0, len(flat) - LENGTH + 1, LENGTH)]}

    rows = load_dataset("parquet", data_files=f"{source}/*.parquet", split="train", streaming=True)
    rows = rows.map(pack, batched=True, batch_size=64, remove_columns=["text"]).shuffle(0, buffer_size=BUFFER)
    for batch in DataLoader(rows.with_format("torch"), batch_size=BATCH, num_workers=workers):
        yield torch.ones_like(batch["tokens"], dtype=torch.bool)


READERS = {"ours": ours, "datasets": datasets}


def stream(reader: str, documents: int, batches: int, workers: int, vocab_size: int = 8192) -> Work:
    """Seconds a token over some batches, after a first one.

    Args:
        reader: `ours` or `datasets`.
        documents: of the corpus.
        batches: of 16 windows of 1,024 tokens.
        workers: processes that read.
        vocab_size: ids of the byte-level BPE.
    """
    import pyarrow.parquet as pq

    source = corpus(Path(tempfile.mkdtemp()), documents)
    tokenizer = BPETokenizer(vocab_size)
    tokenizer.train(row["text"] for row in pq.read_table(f"{source}/0.parquet").to_pylist()[:500])

    def run() -> dict[str, Any]:
        masks = READERS[reader](source, tokenizer, workers)
        next(masks)
        start = time.perf_counter()
        tokens = sum(int(mask.sum()) for mask in islice(masks, batches))
        return {"cost": (time.perf_counter() - start) / tokens, "tokens": 1}

    return run
