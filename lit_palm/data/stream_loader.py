"""Batches out of streams: worker processes, the share of each rank, and the state at any batch.

Rows are numbered through the whole run: row n is the next one of stream n mod `num_streams`, and of W ranks rank r
serves the rows with n mod W = r. So a stream belongs to one rank, and within it to one worker, while the order of the
rows depends on neither; global batch b of G rows is rows [bG, (b + 1)G), whatever W is.

Workers send rows together with the state that each block began with, so the state at a batch is known here, whatever
the workers have read ahead: for every stream, the state its block began with and the rows of the block that were used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from lit_palm.data.packing import Windows
from lit_palm.data.stream_blocks import Plan, first_state
from lit_palm.data.stream_workers import Failure, Reader, Received, used_rows
from lit_palm.types import Experience

__all__ = ["StreamLoader", "check_streams", "check_trainer"]


def check_streams(num_streams: int, ranks: int) -> None:
    """Refuse a number of ranks that the streams cannot be shared among.

    Raises:
        ValueError: naming the numbers that would do.
    """
    if num_streams % ranks:
        fits = [r for r in range(1, num_streams + 1) if num_streams % r == 0]
        near = max(num_streams // ranks, 1) * ranks
        raise ValueError(
            f"data.num_streams is {num_streams}, which {ranks} data-parallel ranks cannot share: use a multiple of"
            f" {ranks} (such as {near} or {near + ranks}), or go on with {', '.join(map(str, fits))} ranks (a run that"
            " is resumed keeps its num_streams)"
        )


def check_trainer(trainer: Any, ends: bool) -> None:
    """Refuse a run that would never end, or that wants to go back.

    Args:
        trainer: about to fit.
        ends: an epoch has an end.

    Raises:
        ValueError: naming the flag and the way out.
    """
    if getattr(trainer, "overfit_batches", 0):
        raise ValueError("trainer.overfit_batches repeats batches, and a stream does not go back: use TextData")
    ends = ends or isinstance(trainer.limit_train_batches, int)
    if not ends and trainer.max_steps < 0 and not any(hasattr(c, "time_remaining") for c in trainer.callbacks):
        raise ValueError(
            "this stream has no end, and nothing ends the training: set trainer.max_steps, or data.batches_per_epoch,"
            " or data.exhausted=stop to read the data once in an epoch"
        )


class StreamLoader:
    """Batches of one process; `len()` only where an epoch has a length.

    Lightning replaces the sampler of a torch DataLoader by one of its own; it leaves this loader alone.

    Args:
        plan: what the streams have in common.
        batch_size: rows in a batch of one process.
        rank: this process among the data-parallel ones.
        ranks: how many there are.
        states: of the streams of this rank at least, by number.
        row: the row of the run to begin with.
        pad_id: fills rows up.
        length: batches of an epoch; None: no end, or the end of the data.
        batch: batches of the first epoch that were already used.
        num_workers: processes that read; 0 reads in this one.
        prefetch: messages that each worker has ready, of about a batch in all.
        pin_memory: put batches where an accelerator copies them from while it computes.
        progress: (batches of this loader that were trained on, those of them that are in the weights). An iteration
            begins after those trained on. None: what was served was trained on.
        any_rank: whether something holds on any rank; needed only where the data ends.
    """

    def __init__(
        self,
        plan: Plan,
        batch_size: int,
        rank: int,
        ranks: int,
        states: dict[int, dict[str, Any]],
        *,
        row: int = 0,
        pad_id: int = 0,
        length: int | None = None,
        batch: int = 0,
        num_workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        progress: Callable[[], tuple[int, int]] | None = None,
        any_rank: Callable[[bool], bool] = bool,
    ) -> None:
        check_streams(plan.num_streams, ranks)
        self.batch_size, self.rank, self.ranks = batch_size, rank, ranks
        self.pad_id, self.length, self.batch = pad_id, length, batch
        self.num_workers, self.prefetch = num_workers, prefetch
        self.pin_memory, self.any_rank = pin_memory, any_rank
        self.served = 0
        self.end: int | None = None
        """The number of batches after which the data ends, once that is known."""
        self._progress = progress
        self._built: dict[int, Experience] = {}
        self._rows_at: dict[int, int] = {0: row}  # the row of the run that a batch begins with
        self._next = 0
        self._template: Experience | None = None
        self._begin(plan, states, row)

    def _begin(self, plan: Plan, states: dict[int, dict[str, Any]], row: int) -> None:
        """Start to read."""
        self.plan, self.end = plan, None
        own = {n: states[n] for n in range(self.rank, plan.num_streams, self.ranks)}
        self._received = {n: Received(used_rows(row, n, plan.num_streams), state) for n, state in own.items()}
        self._rows_at[self._next] = row
        reader = Reader(plan, own, rows_at_once=max(1, self.batch_size // len(own)))
        self._messages = self._connect(reader, min(self.num_workers, len(own)), self.prefetch)

    def _begin_again(self) -> None:
        """The next pass over data that has ended."""
        plan = replace(self.plan, epoch=self.plan.epoch + 1)
        state = first_state(len(plan.sources), plan.epoch)
        self._begin(plan, dict.fromkeys(range(plan.num_streams), state), 0)

    def _connect(self, reader: Reader, num_workers: int, prefetch: int) -> Iterator[Any]:
        if num_workers == 0:
            return iter(reader)
        # a generator of its own: a DataLoader draws from the global one otherwise, which would move the run's dropout
        options: dict[str, Any] = {"collate_fn": _as_it_is, "generator": torch.Generator().manual_seed(0)}
        return iter(DataLoader(reader, None, num_workers=num_workers, prefetch_factor=prefetch, **options))

    # ---- iteration

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("this stream has no length")  # what Lightning takes for "unknown"
        return self.length

    def __iter__(self) -> Iterator[Experience]:
        # a generator: nothing is read before the first batch is asked for
        first, self.batch = self.batch, 0
        self.served, _ = self.progress()
        if self.end is not None and self.served >= self.end:
            self._begin_again()
        for _ in count() if self.length is None else range(first, self.length):
            batch = self._get(self.served)
            if batch is None:
                return
            self.served += 1
            yield batch

    def progress(self) -> tuple[int, int]:
        """Batches trained on, and those of them that are in the weights."""
        return (self.served, self.served) if self._progress is None else self._progress()

    def upcoming(self, count: int) -> list[Experience]:
        """The batches after the one that is trained on, at most `count`, without taking them."""
        first = self.served if self._progress is None else self._progress()[0] + 1
        found = [self._get(first + i) for i in range(count)]
        return [batch for batch in found if batch is not None]

    def state_dict(self) -> dict[str, Any]:
        """Nothing, but Lightning shall know that this loader resumes: the data module keeps the position."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `state_dict`."""

    def close(self) -> None:
        """Stop the workers."""
        self._messages = iter(())

    def _get(self, number: int) -> Experience | None:
        """A batch that may have been made already; None after the end of the data."""
        oldest = min(*self.progress(), number)
        self._built = {n: batch for n, batch in self._built.items() if n >= oldest}
        self._rows_at = {n: row for n, row in self._rows_at.items() if n >= oldest}
        for stream, received in self._received.items():
            received.forget(used_rows(self._rows_at[oldest], stream, self.plan.num_streams))
        while self._next <= number and self.end is None:
            self._build()
        return self._built.get(number)

    def _build(self) -> None:
        """Make the next batch, or find the end of the data; with several ranks, all do it together."""
        together = self.batch_size * self.ranks
        for first in count(self._rows_at[self._next], together):
            mine = range(first + (self.rank - first) % self.ranks, first + together, self.ranks)
            rows = [row for n in mine if (row := self._row(n % self.plan.num_streams)) is not None]
            if self.plan.repeat or self.any_rank(bool(rows)):
                break
            if not self.any_rank(any(r.rows or not r.ended for r in self._received.values())):
                self.end = self._next
                return
        self._built[self._next] = self._pinned(self._collate(rows))
        self._next += 1
        self._rows_at[self._next] = first + together

    def _row(self, stream: int) -> tuple[NDArray[np.int32], NDArray[np.int64]] | None:
        received = self._received[stream]
        while not received.rows and not received.ended:
            self._receive()
        return received.rows.popleft() if received.rows else None

    def _receive(self) -> None:
        try:
            message = next(self._messages, None)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"a worker process that reads the training data died ({error}): most often it was killed for want of"
                " memory; lower data.shuffle_buffer or data.num_workers"
            ) from error
        if isinstance(message, Failure):
            raise ValueError(message.message)
        assert message is not None, "a loader that was closed, or had failed, was asked for more"
        for rows in message:
            self._received[rows.stream].add(rows)

    def _collate(self, rows: list[tuple[NDArray[np.int32], NDArray[np.int64]]]) -> Experience:
        if not rows:  # other ranks have some
            return self._blank()
        lengths = np.concatenate([pieces for _, pieces in rows])
        offsets = np.concatenate([[0], np.cumsum([len(pieces) for _, pieces in rows])])
        windows = Windows(
            np.concatenate([tokens for tokens, _ in rows]),
            np.cumsum(lengths) - lengths,
            lengths,
            self.pad_id,
            room=self.plan.sequence_length if self.plan.pack else None,
            packed=(np.arange(len(lengths)), offsets),
        )
        self._template = batch = windows.collate(np.arange(len(rows)))
        return batch

    def _blank(self) -> Experience:
        """A row without weight."""
        if self._template is None:
            tokenizer = self.plan.tokenizer
            tokens = np.array([*tokenizer.prefix, tokenizer.eos_id], np.int32)
            self._collate([(tokens, np.array([len(tokens)], np.int64))])
        assert self._template is not None
        blank = self._template.select(torch.tensor([0]))
        return Experience({**blank, "loss_mask": torch.zeros_like(blank["loss_mask"])})

    def _pinned(self, batch: Experience) -> Experience:
        if not self.pin_memory:
            return batch
        if not torch.accelerator.is_available():
            rank_zero_warn("data.pin_memory does nothing here: there is no accelerator")
            self.pin_memory = False
            return batch
        return Experience({name: tensor.pin_memory() for name, tensor in batch.items()})

    # ---- state

    def cursors(self) -> list[list[list[int]]]:
        """Where each of this rank's streams stood in the sources when its newest block began."""
        return [(r.blocks[-1][1] if r.blocks else r.initial)["cursors"] for r in self._received.values()]

    def state(self) -> dict[str, Any]:
        """What to go on from with the data that is not in the weights: the pass, the row of the run, and the state of
        each of this rank's streams."""
        _, settled = self.progress()
        if self.end is not None and settled >= self.end:
            return {"epoch": self.plan.epoch + 1, "row": 0, "streams": {}}
        row, streams = self._rows_at[settled], self.plan.num_streams
        own = {n: received.state(used_rows(row, n, streams)) for n, received in self._received.items()}
        return {"epoch": self.plan.epoch, "row": row, "streams": own}


def _as_it_is(item: Any) -> Any:
    return item
