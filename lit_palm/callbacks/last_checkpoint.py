"""Checkpoints that are always there: the newest, some before it, and the best; what a later stage or run starts from.

    callbacks:
      - class_path: lit_palm.callbacks.LastCheckpoint
        init_args: {dirpath: runs/x, every_n_steps: 100, keep_last: 3, monitor: val/loss, asynchronous: true}

The order of a saving: gather (all ranks) -> with `asynchronous` copy -> write under a hidden name -> publish -> remove
what is no longer kept. The last three run in a thread when `asynchronous`.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_palm.callbacks.run_lock import RunLock
from lit_palm.callbacks.shelf import Shelf
from lit_palm.callbacks.snapshot import Buffers, gather, writes_shards
from lit_palm.callbacks.writing import Job, discard, is_storage_error, reason, write
from lit_palm.modules.storage import Place
from lit_palm.timing import span

__all__ = ["LastCheckpoint"]


class LastCheckpoint(Checkpoint):
    """Keeps `dirpath/last.ckpt`, the newest checkpoint: after so many steps, after validation, and when training ends.

    A run that is killed while saving leaves the one before. It is a file, or under a strategy that shards a folder; any
    fsspec URL will do as a place. One run at a time may write to it. When a saving fails because of the place (a full
    disk, a lost network), training goes on with a warning and the checkpoint before stays; at the end of training, and
    after `max_failures` in a row, it is an error. Lightning's `ModelCheckpoint` may be used beside it.

    Args:
        dirpath: folder, or any fsspec URL.
        every_n_steps: optimiser steps between two savings; None: only when training ends.
        keep_last: how many of the newest to keep. More than one are called `step-00000120.ckpt`, beside `last.ckpt`.
        monitor: a logged metric by which the best are chosen, such as `val/loss`; it is read after every validation,
            which then is followed by a saving; in a run without validation, at every saving.
        mode: whether a small value of it is good, or a large one.
        keep_best: how many of the best to keep beside the newest; the very best is `best.ckpt` too.
        asynchronous: copy weights and optimiser state into memory of the host between two steps, and write them while
            training goes on. Needs that memory twice. A saving waits for the one before it.
        retries: how often an operation on a URL is tried again after a transient error.
        max_failures: savings that may fail in a row.

    Raises:
        ValueError: when arguments are out of range; in `setup` when the place cannot be written to, or another run
            writes to it.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_steps: int | None = None,
        keep_last: int = 1,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        keep_best: int = 1,
        asynchronous: bool = False,
        retries: int = 4,
        max_failures: int = 3,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1 or null, got {every_n_steps}")
        for name, value in (("keep_last", keep_last), ("keep_best", keep_best), ("max_failures", max_failures)):
            if value < 1:
                raise ValueError(f"LastCheckpoint: {name} is {value}; it must be at least 1")
        if retries < 0:
            raise ValueError(f"LastCheckpoint: retries is {retries}; it must not be negative")
        if mode not in ("min", "max"):
            raise ValueError(f"LastCheckpoint: mode is {mode!r}; it must be min or max")
        if monitor is None and keep_best != 1:
            raise ValueError("LastCheckpoint: keep_best chooses by a metric: name it as monitor")
        self.dirpath, self.every_n_steps = dirpath, every_n_steps
        self.keep_last, self.keep_best, self.monitor = keep_last, keep_best if monitor else 0, monitor
        self.mode: Literal["min", "max"] = mode
        self.asynchronous, self.retries, self.max_failures = asynchronous, retries, max_failures
        self._saved = -1
        self._stale = False
        self._validated = False
        self._failures = 0
        self._place: Place | None = None
        self._shelf: Shelf | None = None
        self._lock: RunLock | None = None
        self._buffers = Buffers()
        self._thread: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._reserved: Future[None] | None = None
        self._told = False
        self._ending = False
        self._group: Any = None

    # ------------------------------------------------------------------ a run begins and ends

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or _writes_nothing(trainer):
            return
        problem: str | None = None
        if trainer.is_global_zero:
            try:
                self._open()
            except ValueError as error:
                problem = str(error)
        problem = trainer.strategy.broadcast(problem)
        if problem is not None:
            raise ValueError(problem)
        if self._place is None:
            self._place = Place(self.dirpath, self.retries)

    def _open(self) -> None:
        """Take the place, or say why not; on the first rank."""
        try:
            self._place = Place(self.dirpath, self.retries)
        except (ImportError, ValueError) as error:
            raise ValueError(f"checkpoints cannot be written to {self.dirpath}: {error}") from error
        self._lock = RunLock(self._place)
        self._lock.take()
        self._shelf = Shelf(self._place, self.keep_last, self.keep_best, self.mode)
        self._shelf.open()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved, self._stale, self._ending = trainer.global_step, False, False
        if self.asynchronous and not _writes_nothing(trainer):
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="lit_palm-save")
            if writes_shards(trainer.strategy):
                # a group of its own: what the thread says to other ranks must not meet what training says
                self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=30))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def _close(self) -> None:
        """Wait for the saving in flight, and give the place free."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        if self._pending is not None:
            with contextlib.suppress(Exception):
                self._warn(self._pending)
        self._thread = self._pending = self._reserved = self._group = None
        if self._lock is not None:
            self._lock.release()
        self._lock = self._shelf = self._place = None
        self._buffers = Buffers()

    # ------------------------------------------------------------------ when to save

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._pending is not None and self._pending.done():
            self._warn(self._pending)
        self._stale = True
        step = trainer.global_step
        if self.every_n_steps and step and step % self.every_n_steps == 0 and step != self._saved:
            self._save(trainer)
        elif self._thread is not None and self._reserved is None and step > self._saved:
            self._reserve(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._stale = True  # it may have calibrated a reward model
        if self.monitor is not None:
            self._validated = True
            self._save(trainer)
            self._validated = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._collect(trainer)
        self._ending = True
        if self._stale:
            self._save(trainer)
        self._collect(trainer)

    # ------------------------------------------------------------------ how

    def _save(self, trainer: Trainer) -> None:
        if _writes_nothing(trainer):
            return
        with span("checkpoint"):
            self._begin_saving(trainer)

    def _begin_saving(self, trainer: Trainer) -> None:
        """Take the state; write it here, or have the thread write it."""
        self._collect(trainer)
        self._saved, self._stale = trainer.global_step, False
        checkpoint, shards = gather(trainer)
        name = self._shelf.free_name(trainer.global_step) if self._shelf is not None else ""
        if shards is not None:
            name = trainer.strategy.broadcast(name)
        job = Job(name, checkpoint, shards, trainer.global_step, self._score(trainer))
        future: Future[None] = Future()
        if self._thread is None:
            self._run(future, job)
        elif shards is not None or trainer.is_global_zero:
            if self._reserved is not None:
                self._reserved.result()
            job.checkpoint, job.shards = self._buffers.copy((checkpoint, shards))
            self._thread.submit(self._run, future, job)
        else:
            future.set_result(None)
        self._pending, self._told = future, False
        if self._thread is None:
            self._collect(trainer)

    def _run(self, future: Future[None], job: Job) -> None:
        """Write and publish one checkpoint, in the thread of training or in one of its own."""
        assert self._place is not None
        try:
            with span("write checkpoint"):
                write(job, self._place, self._shelf is not None, self._group)
            if self._shelf is not None:
                self._shelf.publish(job)
        except BaseException as error:
            if self._shelf is not None:
                with contextlib.suppress(Exception):
                    discard(job, self._place)
            future.set_exception(error)
        else:
            future.set_result(None)

    def _reserve(self, trainer: Trainer) -> None:
        """After the first step, when the optimiser's state is there: prepare the memory of the first saving."""
        assert self._thread is not None
        tree: Any = None
        if writes_shards(trainer.strategy) is None and trainer.is_global_zero:
            states = [optimizer.state_dict() for optimizer in trainer.optimizers]
            tree = {"state_dict": trainer.strategy.lightning_module_state_dict(), "optimizer_states": states}
        self._reserved = self._thread.submit(self._buffers.reserve, (tree, None))

    def _score(self, trainer: Trainer) -> float | None:
        if self.monitor is None:
            return None
        value = trainer.callback_metrics.get(self.monitor)
        if self._validated and value is None:
            known = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(f"LastCheckpoint: nothing is logged as {self.monitor!r}, its monitor; there are {known}")
        if value is None or (trainer.enable_validation and not self._validated):
            return None
        return float(value)

    # ------------------------------------------------------------------ what became of it

    def _warn(self, done: Future[None]) -> None:
        """Say on this rank that a saving failed, once; an error that is none of the place's is raised at once."""
        error = done.exception()
        if error is None or self._told:
            return
        self._told = True
        if is_storage_error(error):
            rank_zero_warn(
                f"a checkpoint could not be saved to {self.dirpath}: {reason(error)}. The one before is still there, "
                "and training goes on"
            )

    def _collect(self, trainer: Trainer) -> None:
        """Wait for the saving before, and agree with the other ranks on what became of it.

        Raises:
            RuntimeError: it was the last of the run, or `max_failures` in a row failed.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.exception()  # waits
        self._warn(pending)
        if error is not None and not is_storage_error(error):
            raise error
        why = trainer.strategy.broadcast(None if error is None else reason(error))
        self._failures = 0 if why is None else self._failures + 1
        if why is None:
            return
        self._stale = True  # the end of training tries once more
        if self._ending or self._failures >= self.max_failures:
            count = "the last checkpoint" if self._ending else f"{self._failures} checkpoints in a row"
            raise RuntimeError(
                f"{count} could not be saved to {self.dirpath}: {why}. The newest that was saved is still there: make "
                "room or mend the place, and resume from it with --ckpt_path"
            )


def _writes_nothing(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))
