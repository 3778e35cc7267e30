"""Tokens a second of a stream with 0, 1 and 2 workers, beside `datasets`' own streaming doing the same work.

    python -m tests.benchmarks.streaming               # a table on the terminal
    python -m tests.benchmarks.streaming --short       # a small corpus, to see that everything runs

Both read the same shards of parquet, shuffle, tokenise with the same byte-level BPE and pack windows of 1,024 tokens.
The peer is `load_dataset(..., streaming=True)` with `shuffle`, `map` and a DataLoader; it packs as is usual with it, by
cutting the tokens of concatenated documents, which is less work than whole documents with masks and positions. The two
run in turn; a ratio is the median over those pairs. Reading a first buffer is not counted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import load_dataset
from torch.utils.data import DataLoader

from lit_palm.data import BPETokenizer, StreamingTextData

LENGTH, BATCH, BUFFER = 1024, 16, 256


def corpus(folder: Path, documents: int, files: int = 8) -> str:
    """Parquet shards of documents of 20 to 800 words, from a vocabulary of 20,000."""
    choose = random.Random(0)
    words = ["".join(choose.choices("abcdefghijklmnopqrstuvwxyz", k=choose.randint(2, 9))) for _ in range(20_000)]
    for file in range(files):
        texts = [" ".join(choose.choices(words, k=choose.randint(20, 800))) for _ in range(documents // files)]
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


def peers(source: str, tokenizer: Any, workers: int) -> Iterator[torch.Tensor]:
    def pack(rows: dict[str, list[str]]) -> dict[str, Any]:
        ids = tokenizer.encode_batch(rows["text"])
        flat = [i for document in ids for i in (tokenizer.bos_id, *document, tokenizer.eos_id)]
        return {"tokens": [flat[i : i + LENGTH] for i in range(0, len(flat) - LENGTH + 1, LENGTH)]}

    rows = load_dataset("parquet", data_files=f"{source}/*.parquet", split="train", streaming=True)
    rows = rows.map(pack, batched=True, batch_size=64, remove_columns=["text"]).shuffle(0, buffer_size=BUFFER)
    for batch in DataLoader(rows.with_format("torch"), batch_size=BATCH, num_workers=workers):
        yield torch.ones_like(batch["tokens"], dtype=torch.bool)


def speed(batches: Iterator[torch.Tensor], count: int) -> float:
    """Tokens a second over `count` batches, after a first one."""
    next(batches)
    start = time.perf_counter()
    tokens = sum(int(mask.sum()) for mask in islice(batches, count))
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    short = parser.parse_args().short
    documents, count, repeats = (400, 4, 1) if short else (16_000, 24, 3)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = corpus(Path(folder), documents)
        tokenizer = BPETokenizer(8192)
        tokenizer.train(row["text"] for row in pq.read_table(f"{source}/0.parquet").to_pylist()[:500])
        print(f"{'workers':>8} {'ours, tokens/s':>16} {'datasets':>12} {'ratio':>7}")
        for workers in (0, 1, 2):
            pairs = []
            for _ in range(repeats):
                pairs.append(tuple(speed(of(source, tokenizer, workers), count) for of in (ours, peers)))
            ratio = statistics.median(a / b for a, b in pairs)
            mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
            print(f"{workers:>8} {mine:>16,.0f} {theirs:>12,.0f} {ratio:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
