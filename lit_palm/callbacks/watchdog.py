"""Nobody waits for ever: a rank that hangs or dies is named, and the others end with that as their error.

A collective waits for all ranks. Where one was killed, stopped, or is stuck in a read from a dead disk, the others
sit in `all_reduce` without a word, on rented machines. Here each rank has a heartbeat that others read without a
collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import threading
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_palm.callbacks.heartbeat import Heartbeats, Trouble, connect, is_gone, this_process

__all__ = ["STATUS", "Watchdog"]

STATUS = 70
"""Exit status of a process that the watchdog ends (EX_SOFTWARE of sysexits.h)."""

# what the backends say when another process is no longer there
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo", "NCCL", "Socket", "TCPStore",
         "Timed out waiting", "Connection refused", "recvValue", "sendBytes")  # fmt: skip

_runs = 0


class Watchdog(Callback):
    """End the run with one line that names the rank, when a rank hangs, is stopped, or its process is gone.

    A rank makes progress when it reaches the next hook of the training loop: data or a collection, the forward and
    backward pass, the step, a batch of validation, a saving. `timeout` must therefore be longer than the longest of
    these, which with rollouts is a whole collection; what comes before training is not timed. Of ranks that reached the
    same hook, those are named that do not wait in a collective. A process on the same machine that has ended is noticed
    at once, one on another machine, or one that was stopped, after `silence`.

    Every process that is left prints the stacks of its threads and the line to stderr, and ends with status 70 a few
    seconds later. Nothing is saved, the last checkpoint counts. Processes of the same machine that were stopped are
    killed. With one process it watches itself.

    Args:
        timeout: seconds without progress after which a rank counts as hanging.
        silence: seconds without a heartbeat after which a process counts as gone; a long stretch that holds Python's
            global lock looks like this, so not too few.
        interval: seconds between two heartbeats.
    """

    def __init__(self, timeout: float = 1800.0, silence: float = 60.0, interval: float = 1.0) -> None:
        for name, value in (("timeout", timeout), ("silence", silence), ("interval", interval)):
            if not 0 < value < float("inf"):
                raise ValueError(f"Watchdog: {name} is {value}; it must be a positive number of seconds")
        if silence < 3 * interval:
            raise ValueError(f"Watchdog: silence {silence} must be at least three times interval {interval}")
        self.timeout, self.silence, self.interval = timeout, silence, interval
        self._beats: Heartbeats | None = None
        self._trainer: Trainer | None = None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._raised = False
        self._resting = "reading data"

    # ------------------------------------------------------------------ the life of a run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        global _runs
        _runs += 1
        store = None
        if trainer.world_size > 1:
            from torch.distributed import PrefixStore

            store = PrefixStore(f"lit_palm/watchdog/{_runs}", connect(max(self.silence, 10.0)))
        own = this_process(trainer.global_rank)
        own.step = trainer.global_step
        self._beats = Heartbeats(store, trainer.world_size, own, self.timeout, self.silence)
        self._beats.announce()
        trainer.strategy.barrier("watchdog")
        self._beats.meet()
        _take_over_from_launcher()
        self._trainer, self._raised, self._stop = trainer, False, threading.Event()
        self._threads = [
            threading.Thread(target=loop, name=f"watchdog-{loop.__name__}", daemon=True)
            for loop in (self._exchange, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def _exchange(self) -> None:
        assert self._beats is not None
        while not self._stop.wait(self.interval):
            self._beats.exchange()

    def _judge(self) -> None:
        assert self._beats is not None
        while not self._stop.wait(self.interval / 2):
            trouble = self._beats.judge()
            if trouble is not None and not self._stop.is_set():
                self._end(trouble)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait for the other ranks to be done, since the store ends with the first of them, still watching."""
        if self._beats is None or stage != "fit":
            return
        self._beats.own.state = "done"
        deadline = time.monotonic() + self.timeout
        with contextlib.suppress(Exception):  # the store has gone: so have the others
            self._beats.exchange()
            while not self._beats.finished() and time.monotonic() < deadline:
                self._stop.wait(min(self.interval, 0.05))
        self._leave()

    def _leave(self) -> None:
        self._stop.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2 * self.interval)
        self._beats, self._threads = None, []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say why this rank ends, or, where it only lost the others, who of them is at fault."""
        beats = self._beats
        if beats is None:
            return
        words = (str(exception).strip().splitlines() or [""])[0][:300]
        text = f"{type(exception).__name__}: {words}".removesuffix(": ")
        if beats.world_size > 1 and is_lost_connection(exception):
            self._raised = True
            # the judging thread ends the process as soon as it knows which rank it was
            self._stop.wait(self.silence + beats.grace + 3 * self.interval)
            self._end(Trouble(f"the connection to the other ranks broke ({text})"))
        self._stop.set()
        beats.own.state = f"failed ({text})"
        if beats.store is not None:
            with contextlib.suppress(Exception):
                beats.exchange()
                beats.report(Trouble(f"{beats.own.name} failed, {beats.own.place}: {text}"))
                time.sleep(min(3 * self.interval, 3.0))  # the others read it before this process has gone
        self._leave()

    def _end(self, trouble: Trouble) -> None:
        """Print the line and the stacks, end what can no longer end by itself, and leave."""
        beats = self._beats
        assert beats is not None
        own = beats.own
        # an error says where it was raised; in one piece, since several ranks write at once
        stacks = "" if self._raised else _stacks()
        text = (
            f"{stacks}lit-palm: error: watchdog: {trouble.text}; this is rank {own.rank}, in {own.phase}, after step "
            f"{own.step}, and it ends with status {STATUS}: resume from the last checkpoint\n"
        )
        print(text, end="", file=sys.stderr, flush=True)
        if beats.store is not None and all(beat.rank for beat in trouble.culprits):  # the first one holds the store
            sender = threading.Thread(target=_tell, args=(beats, trouble), daemon=True)
            sender.start()  # a store that does not answer must not keep us
            sender.join(2 * self.interval)
        for beat in trouble.culprits:
            if beat.rank != own.rank and beat.host == own.host and not is_gone(beat, own.host):
                with contextlib.suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)
        self._end_children(beats.grace + 3 * self.interval)
        os._exit(STATUS)

    def _end_children(self, seconds: float) -> None:
        """Give the processes that Lightning's launcher started time to print the same, then kill what is left."""
        launcher = self._trainer.strategy.launcher if self._trainer is not None else None
        procs = getattr(launcher, "procs", [])
        deadline = time.monotonic() + seconds
        while any(p.poll() is None for p in procs) and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in procs:
            if process.poll() is None:
                process.kill()

    # ------------------------------------------------------------------ progress

    def _move(self, trainer: Trainer, phase: str) -> None:
        if self._beats is not None:
            self._beats.move(phase, trainer.global_step)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rest(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rest(trainer, pl_module)

    def _rest(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between two batches: waiting for data, or sampling a collection."""
        loader = getattr(getattr(pl_module, "rollouts", None), "loader", None)
        samples = loader is not None and (loader.buffer is None or loader.position >= loader.num_batches)
        self._resting = "a collection" if samples else "reading data"
        self._move(trainer, self._resting)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._move(trainer, "forward and backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._move(trainer, "the optimiser step")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._rest(trainer, pl_module)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kw: Any) -> None:
        self._move(trainer, "validation")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._move(trainer, self._resting)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._move(trainer, "saving")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._move(trainer, "the end of training")


def is_lost_connection(exception: BaseException) -> bool:
    """Whether an error is a backend's, about a process that is no longer there."""
    import torch.distributed as dist

    if isinstance(exception, dist.DistError):
        return True
    return isinstance(exception, RuntimeError) and any(part in str(exception) for part in _LOST)


def _stacks() -> str:
    """What every thread of this process is doing."""
    with contextlib.suppress(Exception), tempfile.TemporaryFile("w+", errors="replace") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return "\n" + file.read()
    return ""


def _tell(beats: Heartbeats, trouble: Trouble) -> None:
    with contextlib.suppress(Exception):  # the store may be what is gone
        beats.report(trouble)


def _take_over_from_launcher() -> None:
    """Lightning's observer kills this process without a word when a child has ended badly: we say who it was."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]
