"""One stream of packed rows, a function of counters and of the place in every source that its state names.

A stream draws documents from its sources, tokenises them, and collects a *block*: as many tokens as `block_rows`
windows hold. The block is packed as TextData packs (packing.py) and its windows are served in the order of a
counter-based permutation, while the documents of the next block are read ahead, a few for each row. Nothing carries
over from block to block but the state, so a stream resumes from the state that its block began with and the rows served
since: it reads that one block again.

The source of the next draw is the one whose tokens lag most behind its weight (stride scheduling, Waldspurger and Weihl
1995): shares of tokens are exact to within one draw, and no random number is involved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_palm.data.packing import pack, split_documents
from lit_palm.data.sampler import permutation
from lit_palm.data.sources import Row, TextUnit, column
from lit_palm.data.stream_parts import Found, ParquetPart, Part
from lit_palm.data.stream_sources import StreamSource, deal
from lit_palm.data.text import Document, checked
from lit_palm.data.tokenizers import Tokenizer

__all__ = ["Block", "Mixed", "Plan", "Stream", "document", "documents", "first_state"]

DRAW_DOCUMENTS = 64
CHARACTERS = 4  # of text that a token stands for, roughly: how much a draw reads before it is tokenised


class Mixed(NamedTuple):
    """A source in a mixture."""

    source: StreamSource
    weight: float
    text_column: str


@dataclass
class Plan:
    """What all streams of a run have in common; goes to the workers."""

    sources: list[Mixed]
    tokenizer: Tokenizer
    sequence_length: int
    pack: bool
    num_streams: int
    block_rows: int
    shuffle: bool
    seed: int
    repeat: bool
    text_unit: TextUnit
    epoch: int = 0
    """Passes over the data that are over, where it is not repeated within one."""


@dataclass
class Block:
    """Rows of a block, in the order in which they are served.

    Attributes:
        state: what the stream's state was when the block began.
        tokens: [n] of all pieces.
        starts, lengths: [pieces] of each piece in `tokens`.
        order, offsets: row r holds the pieces order[offsets[r]:offsets[r + 1]].
        rows: [rows] in which order they are served.
    """

    state: dict[str, Any]
    tokens: NDArray[np.int32]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    order: NDArray[np.int64]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]

    def row(self, index: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Tokens of the pieces in a row, one after the other, and the pieces' lengths."""
        row = self.rows[index]
        pieces = self.order[self.offsets[row] : self.offsets[row + 1]]
        parts = [self.tokens[self.starts[p] : self.starts[p] + self.lengths[p]] for p in pieces]
        return np.concatenate(parts), self.lengths[pieces]


def first_state(num_sources: int, epoch: int = 0) -> dict[str, Any]:
    """The state of a stream that has read nothing: counters, and for each source [epoch, part, place, tokens]."""
    # blocks are numbered on from pass to pass, so that each is shuffled in an order of its own
    return {"block": epoch << 32, "offset": 0, "cursors": [[epoch, 0, 0, 0] for _ in range(num_sources)]}


def document(part: Part, found: Found, text_column: str, vocab_size: int) -> str | list[int] | None:
    """The text of a row, or its ids where it comes tokenised; None for a row without anything but white space.

    Raises:
        ValueError: naming file, line and column.
    """
    text = found.columns.get(text_column)
    if isinstance(text, str):
        return text if text.strip() else None
    row = Row(part.where(found.number), found.columns)
    if "tokens" not in found.columns or text_column in found.columns:
        return str(column(row, text_column, str))  # an error: it is missing or of another type
    tokens = list(column(row, "tokens", (list, tuple)))
    return checked(Document(None, tokens, row.where), vocab_size)


def documents(mixed: Mixed, text_unit: TextUnit, vocab_size: int) -> Iterator[str | list[int]]:
    """The documents of a source, file after file.

    Raises:
        ValueError: naming file, line and column.
    """
    for shard in range(mixed.source.num_shards):
        part = mixed.source.part(shard, 0, 1, text_unit)
        for found in part.read(0):
            text = document(part, found, mixed.text_column, vocab_size)
            if text is not None:
                yield text


class Stream:
    """One of the streams of a plan.

    Args:
        plan: shared by all streams.
        number: which stream.
    """

    def __init__(self, plan: Plan, number: int) -> None:
        self.plan, self.number = plan, number
        self._parts = [
            deal(m.source.num_shards, plan.num_streams, number, self._seed(i + 1) if plan.shuffle else None)
            for i, m in enumerate(plan.sources)
        ]
        # streams do not all begin with the same source
        places = [permutation(1024, self._seed(i + 1, number), 0)[0] / 1024 for i in range(len(plan.sources))]
        self._phases = [float(place) * plan.sequence_length for place in places]
        self._open: list[_Open | None] = [None] * len(plan.sources)

    def _seed(self, source: int, stream: int = 0) -> int:
        return (self.plan.seed * 1_000_003 + source) * 1_000_003 + stream

    def rows(self, state: dict[str, Any]) -> Iterator[tuple[Block, int]]:
        """(block, index of the row in it), from a state on; without end if sources are repeated."""
        collected = _Collection(self, state)
        block, offset = collected.finish(), int(state["offset"])
        while block is not None:
            collected = _Collection(self, collected.state)
            count = len(block.rows)
            for index in range(offset, count):
                yield block, index
                collected.reach((index + 1) / count)
            block, offset = collected.finish(), 0

    def packed(self, began: dict[str, Any], documents: list[list[int]]) -> Block:
        plan = self.plan
        sizes = np.array([len(d) for d in documents], np.int64)
        tokens = np.concatenate([np.asarray(d, np.int32) for d in documents])
        starts, lengths = split_documents(sizes, plan.sequence_length)
        if plan.pack:
            order, offsets = pack(lengths, plan.sequence_length)
        else:
            order, offsets = np.arange(len(lengths)), np.arange(len(lengths) + 1)
        count = len(offsets) - 1
        rows = permutation(count, self._seed(0, self.number), began["block"]) if plan.shuffle else np.arange(count)
        return Block(began, tokens, starts, lengths, order, offsets, rows)

    # ---- the mixture

    def next_source(self, cursors: list[list[int]]) -> int | None:
        """The source that lags most behind its share; None when all have ended."""
        best, least = None, 0.0
        for index, (mixed, cursor) in enumerate(zip(self.plan.sources, cursors, strict=True)):
            if not self.plan.repeat and cursor[0] > self.plan.epoch:
                continue
            lag = (cursor[3] + self._phases[index]) / mixed.weight
            if best is None or lag < least:
                best, least = index, lag
        return best

    def draw(self, source: int, cursor: list[int]) -> list[list[int]]:
        """A few documents of one source, tokenised; moves the cursor."""
        enough = CHARACTERS * self.plan.sequence_length
        found: list[str | list[int]] = []
        characters = 0
        begun, epoch = False, cursor[0]
        while characters < enough and len(found) < DRAW_DOCUMENTS:
            text = self._read(source, cursor)
            if text is None:  # the end of the source
                cursor[0], cursor[1], cursor[2] = cursor[0] + 1, 0, 0
                if not self.plan.repeat:
                    break
                if begun and not found and cursor[0] > epoch + 1:
                    raise ValueError(self._nothing(source))
                begun = True
                continue
            found.append(text)
            characters += len(text) if isinstance(text, str) else CHARACTERS * len(text)
        encoded = iter(self.plan.tokenizer.encode_batch([t for t in found if isinstance(t, str)]))
        prefix, eos = self.plan.tokenizer.prefix, self.plan.tokenizer.eos_id
        return [[*prefix, *(next(encoded) if isinstance(t, str) else t), eos] for t in found]

    def _nothing(self, source: int) -> str:
        streams = self.plan.num_streams
        return (
            f"{self.plan.sources[source].source.name}: stream {self.number + 1} of {streams} gets no document of it:"
            f" the source has fewer than data.num_streams {streams}; lower that, or leave the source out"
        )

    def _read(self, source: int, cursor: list[int]) -> str | list[int] | None:
        """The next document of a source; None at its end."""
        mixed = self.plan.sources[source]
        parts = self._parts[source]
        while cursor[1] < len(parts):
            opened = self._open[source]
            if opened is None or opened.at != (cursor[0], cursor[1], cursor[2]):
                opened = self._open[source] = self._opened(source, cursor)
            for found in opened.rows:
                cursor[2] = found.place
                opened.at = (cursor[0], cursor[1], cursor[2])
                text = document(opened.part, found, mixed.text_column, self.plan.tokenizer.vocab_size)
                if text is not None:
                    return text
            cursor[1], cursor[2] = cursor[1] + 1, 0
        return None

    def _opened(self, source: int, cursor: list[int]) -> _Open:
        mixed, parts = self.plan.sources[source], self._parts[source]
        index = cursor[1]
        if self.plan.shuffle:
            index = int(permutation(len(parts), self._seed(source + 1, self.number + 1), cursor[0])[index])
        part = mixed.source.part(*parts[index], self.plan.text_unit)
        if isinstance(part, ParquetPart):
            part.columns = (mixed.text_column, "tokens")
        return _Open((cursor[0], cursor[1], cursor[2]), part, part.read(cursor[2]))


@dataclass
class _Open:
    """A part that is being read, and the cursor that its next row belongs to."""

    at: tuple[int, int, int]
    part: Part
    rows: Iterator[Found] = field(repr=False)


class _Collection:
    """A block that is being collected.

    Args:
        stream: whose block.
        state: where it begins; `self.state` moves on from there.
    """

    def __init__(self, stream: Stream, state: dict[str, Any]) -> None:
        self.stream = stream
        self.began = {**copy.deepcopy(state), "offset": 0}
        self.state = {**copy.deepcopy(self.began), "block": state["block"] + 1}
        self.documents: list[list[int]] = []
        self.wanted, self.total = stream.plan.block_rows * stream.plan.sequence_length, 0
        self.complete = False

    def reach(self, share: float) -> None:
        """Draw until a share of the block is there."""
        cursors = self.state["cursors"]
        while not self.complete and self.total < share * self.wanted:
            source = self.stream.next_source(cursors)
            if source is None:
                self.complete = True
                return
            drawn = self.stream.draw(source, cursors[source])
            count = sum(map(len, drawn))
            cursors[source][3] += count
            self.documents += drawn
            self.total += count

    def finish(self) -> Block | None:
        """The whole block; None when there is nothing left."""
        self.reach(1.0)
        return self.stream.packed(self.began, self.documents) if self.documents else None
