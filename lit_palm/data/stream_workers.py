"""Between the processes: what a worker sends of its streams, and what is kept of it where batches are made.

A message holds some rows of each of the worker's streams, flat, with the state that every block in it began with.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from lit_palm.data.stream_blocks import Block, Plan, Stream

__all__ = ["Failure", "Reader", "Received", "Rows", "used_rows"]


def used_rows(row: int, stream: int, num_streams: int) -> int:
    """How many rows of a stream are among the first `row` rows of the run."""
    return max(-(-(row - stream) // num_streams), 0)


class Rows(NamedTuple):
    """What a worker sends for one stream: some rows, flat."""

    stream: int
    begun: list[tuple[int, dict[str, Any]]]
    """(index of a row in this message, state) of every block that begins in it; negative at the first of a resume."""
    tokens: NDArray[np.int32]
    lengths: NDArray[np.int64]
    """[pieces]"""
    pieces: NDArray[np.int64]
    """[rows] pieces in each"""
    ended: bool


class Failure(NamedTuple):
    """Sent in place of rows when the data is not as it should be."""

    message: str


class Reader(IterableDataset[Any]):
    """Runs in a worker: rows of those streams of a rank that are the worker's."""

    def __init__(self, plan: Plan, states: dict[int, dict[str, Any]], rows_at_once: int) -> None:
        self.plan, self.states, self.rows_at_once = plan, states, rows_at_once

    def __iter__(self) -> Iterator[list[Rows] | Failure]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        if worker is not None:  # of each worker one thread; and the library would warn that it was forked
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            # a streaming dataset of `datasets` gives each worker it sees a part of the shards; here every worker opens
            # the shards that are its own
            torch.utils.data._utils.worker._worker_info = None
        numbers = sorted(self.states)[first::step]
        try:
            streams = [_Source(Stream(self.plan, n).rows(self.states[n]), n) for n in numbers]
            while True:
                yield [stream.take(self.rows_at_once) for stream in streams]
        except ValueError as error:  # the user's data: told once, without the worker's traceback
            yield Failure(str(error))


class _Source:
    """A stream in a worker."""

    def __init__(self, rows: Iterator[tuple[Block, int]], number: int) -> None:
        self.rows, self.number, self.block = rows, number, -1

    def take(self, wanted: int) -> Rows:
        """The next rows, fewer at the end of the stream."""
        begun, tokens, lengths = [], [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for block, index in islice(self.rows, wanted):
            if block.state["block"] != self.block:
                self.block = block.state["block"]
                begun.append((len(tokens) - 1 - index, block.state))
            row_tokens, row_lengths = block.row(index)
            tokens.append(row_tokens)
            lengths.append(row_lengths)
        pieces = np.array([len(x) for x in lengths[1:]], np.int64)
        ended = len(pieces) < wanted
        return Rows(self.number, begun, np.concatenate(tokens), np.concatenate(lengths), pieces, ended)


class Received:
    """The rows of one stream that have come and are not used, and the blocks that they are from."""

    def __init__(self, used: int, initial: dict[str, Any]) -> None:
        self.initial = initial
        self.rows: deque[tuple[NDArray[np.int32], NDArray[np.int64]]] = deque()
        self.came = used
        self.blocks: deque[tuple[int, dict[str, Any]]] = deque()
        """(number of the stream's row that it begins with, state)"""
        self.ended = False

    def add(self, rows: Rows) -> None:
        self.blocks.extend((self.came + first, state) for first, state in rows.begun)
        pieces = np.split(rows.lengths, np.cumsum(rows.pieces)[:-1]) if len(rows.pieces) else []
        ends = np.cumsum([p.sum() for p in pieces]).astype(np.int64)
        self.rows.extend(zip(np.split(rows.tokens, ends[:-1]), pieces, strict=True) if pieces else ())
        self.came += len(pieces)
        self.ended = rows.ended

    def forget(self, used: int) -> None:
        """Blocks that were over with the stream's first `used` rows."""
        while len(self.blocks) > 1 and self.blocks[1][0] <= used:
            self.blocks.popleft()

    def state(self, used: int) -> dict[str, Any]:
        """The state after the stream's first `used` rows."""
        if not self.blocks:
            return self.initial
        first, state = next(block for block in reversed(self.blocks) if block[0] <= used)
        return {**state, "offset": used - first}
