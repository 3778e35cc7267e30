"""Told to go, a run saves, ends cleanly and asks to be started again: SIGTERM, SLURM's warning, a spot instance's end.

Signals reach the ranks at different moments, in different collectives, where saving or broadcasting (as Lightning's own
handlers do) would hang. Here a handler only sets a flag; the ranks agree on it after an optimiser step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_palm.callbacks.saving import can_save, save_now

__all__ = ["STATUS", "Preemption"]

STATUS = 75
"""Exit status of a run that was told to stop and can go on (EX_TEMPFAIL of sysexits.h)."""


class Preemption(Callback):
    """On a signal: finish the optimiser step, save, stop, and ask SLURM to start the job again.

    The signal may reach one rank or all. They compare notes once an optimiser step (one number over the CPU, where
    there are several ranks), save through the run's checkpoint callback (`LastCheckpoint`), and leave training without
    another validation; one that was due is made after the restart. The same command with `--ckpt_path` goes on exactly.
    The command line ends with status 75, so that a script can tell this end from the real one.

    What is under way is finished first: a collection with its first step, a validation. So let the warning come early
    enough: `#SBATCH --signal=USR1@300` gives 300 seconds. Under SLURM this takes the place of Lightning's
    own re-queueing.

    Args:
        signals: by name.
        requeue: call `scontrol requeue` for this job when it runs under SLURM.
        every_n_steps: optimiser steps between two comparisons of notes.
    """

    def __init__(
        self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1"), requeue: bool = True, every_n_steps: int = 1
    ) -> None:
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown or not signals:
            raise ValueError(f"Preemption: signals {list(signals)}: name at least one, such as SIGTERM or SIGINT")
        if {"SIGKILL", "SIGSTOP"} & set(signals):
            raise ValueError("Preemption: signals: nobody can handle SIGKILL and SIGSTOP; leave them out")
        if every_n_steps < 1:
            raise ValueError(f"Preemption: every_n_steps is {every_n_steps}; it must be at least 1")
        self.signals, self.requeue, self.every_n_steps = tuple(signals), requeue, every_n_steps
        self._received = 0
        self._told = ""
        self._group: Any = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not can_save(trainer):
            raise ValueError(
                "Preemption saves through a checkpoint callback, and this run has none: add LastCheckpoint"
            )
        # after all others: what they do at a step's end belongs into the checkpoint, and to this step
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of Lightning's handlers, which are there by now; it restores the first ones at the end."""
        self._received, self._told, self._group = 0, "", None
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("Preemption: signals reach the main thread only, and this run is in another: none is heeded")
        else:
            for number in self._numbers(trainer):
                signal.signal(number, self._note)
        if trainer.world_size > 1 and torch.distributed.get_backend() != "gloo":
            self._group = torch.distributed.new_group(backend="gloo")

    def _numbers(self, trainer: Trainer) -> set[signal.Signals]:
        numbers = {signal.Signals[name] for name in self.signals}
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            numbers.add(environment.requeue_signal)  # or Lightning would save in its handler, and requeue a second time
        return numbers

    def _note(self, number: int, frame: Any) -> None:
        self._received = self._received or number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate() or self._told or trainer.global_step % self.every_n_steps:
            return
        number = self._agreed(trainer)
        if not number:
            return
        path = save_now(trainer)
        self._told = signal.Signals(number).name
        trainer.should_stop = True
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None  # or it would go on to these
        # Lightning would validate first, and there may be no time; the checkpoint says that it is due
        trainer.fit_loop.epoch_loop._skip_next_val = True
        if trainer.is_global_zero:
            print(
                f"lit-palm: stopped by {self._told} after step {trainer.global_step}; saved {path}: the same command "
                f"with --ckpt_path {path} goes on",
                file=sys.stderr,
                flush=True,
            )

    def _agreed(self, trainer: Trainer) -> int:
        """The largest signal number that any rank has received; 0: none."""
        if trainer.world_size == 1:
            return self._received
        flag = torch.tensor(self._received)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(flag)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self._told:
            return
        trainer.strategy.barrier("preemption")  # nothing is killed by the re-queueing that still writes
        if trainer.is_global_zero:
            # of the first process only: Lightning's launcher takes a bad status of another for a crash
            trainer.exit_status = STATUS  # type: ignore[attr-defined]
            if self.requeue and "SLURM_JOB_ID" in os.environ:
                _requeue()
        self._told = ""


def _requeue() -> None:
    """Ask SLURM to run this job, or this task of an array, again."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        words = (getattr(error, "stderr", None) or str(error)).strip()
        print(f"lit-palm: `scontrol requeue {job}` failed ({words}): submit the job again", file=sys.stderr, flush=True)
    else:
        print(f"lit-palm: SLURM runs job {job} again", file=sys.stderr, flush=True)
