"""PaLM's remedy for loss spikes: go back some hundred steps, leave out the data around the spike, and go on.

Chowdhery et al. 2022, section 5.1: spikes came about twenty times in the largest run, in spite of clipping; going back
about 100 steps and leaving out 200 to 500 batches kept each from coming again, though none of these batches was bad in
itself: it is a batch together with a state of the weights.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_palm.callbacks import going_back

__all__ = ["SpikeRewind"]

SAVES = 4
"""Checkpoints whose snapshots are kept: a run may save its last and its best, and be killed while it saves."""

FLOOR = 0.01
"""Smallest deviation, as a share of the median: a loss that hardly moves would make a spike of anything."""


class SpikeRewind(Callback):
    """When the training loss spikes, go back to a snapshot from before and leave out the batches around the spike.

    A step is above when its loss, the mean over micro-batches and ranks, exceeds median + `deviations` * 1.4826 *
    MAD (the median absolute deviation) of the last `window` losses that were not; `patience` such steps in a row are a
    spike. Weights, optimiser, schedules, objective and the step count then go back to the newest snapshot that is
    at least `rewind_steps` older than the spike (or the oldest there is); the data goes on, `skip_batches` counted from
    where the snapshot was taken, to the end of an accumulation window. The step axis of loggers goes back with it.
    `guard/rewinds` counts; one more than `max_rewinds` ends the run with the reason.

    Snapshots are files of each rank's own part of the state, read by that rank alone: `dirpath` may be on a machine's
    own disk, as long as a resumed run finds it there. Kept are as many as `rewind_steps` needs, and those that the last
    few checkpoints need, since a run that is resumed from one meets the same spikes again, and goes on exactly. It is
    for runs that learn from data, not for rollouts.

    Args:
        dirpath: folder of the snapshots.
        rewind_steps: optimiser steps to go back from where the spike began, at least.
        skip_batches: batches of a process to leave out, those since the snapshot included.
        snapshot_every: optimiser steps between two snapshots.
        deviations: how far above the median a spike is.
        patience: steps in a row that are above.
        window: losses that make the median.
        warmup: first optimiser steps, which are not judged.
        max_rewinds: of a run.
    """

    def __init__(
        self,
        dirpath: str,
        rewind_steps: int = 100,
        skip_batches: int = 300,
        snapshot_every: int = 100,
        deviations: float = 6.0,
        patience: int = 3,
        window: int = 100,
        warmup: int = 200,
        max_rewinds: int = 10,
    ) -> None:
        smallest = {"rewind_steps": 1, "skip_batches": 0, "snapshot_every": 1, "patience": 1, "window": 5, "warmup": 0}
        smallest["max_rewinds"] = 0
        given = {"rewind_steps": rewind_steps, "skip_batches": skip_batches, "snapshot_every": snapshot_every,
                 "patience": patience, "window": window, "warmup": warmup, "max_rewinds": max_rewinds}  # fmt: skip
        for name, value in given.items():
            if value < smallest[name]:
                raise ValueError(f"SpikeRewind: {name} is {value}; it must be at least {smallest[name]}")
        if not 0 < deviations < math.inf:
            raise ValueError(f"SpikeRewind: deviations is {deviations}; it must be positive")
        self.dirpath, self.rewind_steps, self.skip_batches = Path(dirpath), rewind_steps, skip_batches
        self.snapshot_every, self.deviations, self.patience = snapshot_every, deviations, patience
        self.window, self.warmup, self.max_rewinds = window, warmup, max_rewinds
        self.rewinds = 0
        self._losses: deque[float] = deque(maxlen=window)
        self._above = 0
        self._sum, self._count = torch.zeros(()), 0
        self._snapshots: list[dict[str, int]] = []  # step, batch (of all epochs: it never goes back), ranks
        self._listed: deque[list[int]] = deque(maxlen=SAVES)  # snapshots that the last checkpoints name
        self._pending = 0

    # ------------------------------------------------------------------ set-up

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        objective = getattr(pl_module, "objective", None)
        if stage != "fit":
            return
        if objective is None:
            raise ValueError(f"SpikeRewind restores lit_palm's modules, and {type(pl_module).__name__} is none")
        if "rollouts" in objective.needs:
            raise ValueError(
                f"SpikeRewind leaves out batches of a data set, and {type(objective).__name__} samples its own: use "
                "CollapseGuard"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.skip_batches + trainer.accumulate_grad_batches > trainer.num_training_batches:
            raise ValueError(
                f"SpikeRewind: skip_batches {self.skip_batches} would leave out a whole epoch, which has "
                f"{trainer.num_training_batches} batches: lower it"
            )
        self._sum, self._count = torch.zeros((), device=pl_module.device), 0
        usable = [s for s in self._snapshots if s["ranks"] == trainer.world_size]
        if len(usable) < len(self._snapshots):
            rank_zero_warn(
                f"SpikeRewind: the snapshots were taken by {self._snapshots[0]['ranks']} processes, now there are "
                f"{trainer.world_size}: a spike cannot go back to before this restart"
            )
        self._snapshots = usable
        if not usable:
            self._take(trainer)

    # ------------------------------------------------------------------ every step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._pending:  # the first batch of an epoch: one that comes later takes its place
            last = _pass_over(trainer, self._pending)
            last = trainer.strategy.batch_to_device(pl_module._on_before_batch_transfer(last), dataloader_idx=0)
            batch.clear()
            batch.update(last)
            batch.__dict__.update(last.__dict__)
            self._pending = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._sum, self._count = self._sum + trainer.callback_metrics["loss"].to(self._sum.device), self._count + 1
        if trainer.fit_loop._should_accumulate():
            return
        if self._is_spike(trainer, self._mean(trainer, pl_module)):
            self._rewind(trainer)
        elif self._above == 0 and trainer.global_step % self.snapshot_every == 0:
            self._take(trainer)
        pl_module.log("guard/rewinds", float(self.rewinds), batch_size=1)

    def _mean(self, trainer: Trainer, pl_module: LightningModule) -> float:
        """The step's loss, the same on every rank."""
        mean = self._sum / self._count
        self._sum, self._count = torch.zeros_like(self._sum), 0
        if trainer.world_size > 1:
            mean = trainer.strategy.reduce(mean, reduce_op="mean")  # type: ignore[assignment]
        return float(mean)

    def _is_spike(self, trainer: Trainer, loss: float) -> bool:
        ready = len(self._losses) == self.window and trainer.global_step > self.warmup
        if ready and not loss <= self.threshold():
            self._above += 1
            return self._above >= self.patience
        self._above = 0
        if math.isfinite(loss):
            self._losses.append(loss)
        return False

    def threshold(self) -> float:
        """The loss above which a step is suspicious."""
        middle = statistics.median(self._losses)
        spread = 1.4826 * statistics.median(abs(loss - middle) for loss in self._losses)
        return middle + self.deviations * max(spread, FLOOR * abs(middle))

    # ------------------------------------------------------------------ there and back

    def _path(self, trainer: Trainer, batch: int) -> Path:
        return self.dirpath / f"snapshot-{batch:09d}-rank{trainer.global_rank}.pt"

    def _take(self, trainer: Trainer) -> None:
        batch = int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)
        going_back.save(going_back.take(trainer), self._path(trainer, batch))
        self._snapshots.append({"step": trainer.global_step, "batch": batch, "ranks": trainer.world_size})
        # one that is old enough for a spike that begins at the next step, and all that are newer
        old = [s for s in self._snapshots if s["step"] <= trainer.global_step - self.rewind_steps - self.patience]
        self._drop(trainer, old[:-1])

    def _drop(self, trainer: Trainer, gone: list[dict[str, int]]) -> None:
        """Forget snapshots, and delete those that no checkpoint names."""
        self._snapshots = [s for s in self._snapshots if s not in gone]
        needed = {s["batch"] for s in self._snapshots}.union(*self._listed)
        for path in self.dirpath.glob(f"snapshot-*-rank{trainer.global_rank}.pt"):
            number = int(path.name.split("-")[1])
            if number not in needed:
                path.unlink(missing_ok=True)

    def _rewind(self, trainer: Trainer) -> None:
        step, start = trainer.global_step, trainer.global_step - self._above
        threshold = self.threshold()
        if self.rewinds >= self.max_rewinds:
            raise RuntimeError(
                f"SpikeRewind: at step {step} the loss was above {threshold:.4g} for {self._above} steps, after "
                f"{self.rewinds} rewinds, which is max_rewinds: lower the learning rate or clip harder"
            )
        target = ([s for s in self._snapshots if s["step"] <= start - self.rewind_steps] or self._snapshots[:1])[-1]
        path = self._path(trainer, target["batch"])
        if not path.exists():
            raise RuntimeError(
                f"SpikeRewind: the loss spiked at step {step}, and {path} is gone: keep dirpath while the run lasts"
            )
        going_back.restore(trainer, going_back.load(path))
        self._drop(trainer, [s for s in self._snapshots if s["batch"] > target["batch"]])
        self.rewinds, self._above = self.rewinds + 1, 0
        skipped = self._skip(trainer, target["batch"])
        if trainer.is_global_zero:
            print(
                f"lit-palm: SpikeRewind: loss above {threshold:.4g} for {self.patience} steps up to step {step}: "
                f"went back to step {target['step']} and leaves out {skipped} more batches (rewind {self.rewinds} of "
                f"{self.max_rewinds})",
                file=sys.stderr,
                flush=True,
            )

    def _skip(self, trainer: Trainer, since: int) -> int:
        """Leave out what is left of `skip_batches`, to the end of an accumulation window; perhaps in the next epoch."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        every = trainer.accumulate_grad_batches
        count = max(0, self.skip_batches - (progress.total.ready - since))
        left = trainer.num_training_batches - progress.current.ready  # of a stream without a length, infinity
        now = -(-count // every) * every
        if now >= left:  # this epoch is over; windows begin anew with the next
            now = int(left)
            self._pending = max(0, -(-(count - now) // every) * every)
        _pass_over(trainer, now)
        return now + self._pending

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Losses seen, rewinds made, batches still to leave out, and where the snapshots are."""
        return {
            "rewinds": self.rewinds,
            "losses": list(self._losses),
            "above": self._above,
            "pending": self._pending,
            "snapshots": [dict(entry) for entry in self._snapshots],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on as the checkpoint says."""
        self.rewinds, self._above = int(state_dict["rewinds"]), int(state_dict["above"])
        self._losses = deque(state_dict["losses"], maxlen=self.window)
        self._pending = int(state_dict["pending"])
        self._snapshots = [dict(entry) for entry in state_dict["snapshots"]]
        self._listed.append([entry["batch"] for entry in self._snapshots])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what this checkpoint names."""
        self._listed.append([entry["batch"] for entry in self._snapshots])


def _pass_over(trainer: Trainer, count: int) -> Any:
    """Take batches of this epoch without training on them; gives the last.

    Lightning counts them as if they had been trained on, since its count is the position in the data.
    """
    progress = trainer.fit_loop.epoch_loop.batch_progress
    fetcher: Any = trainer.fit_loop._data_fetcher
    batch: Any = None
    for _ in range(count):
        batch, _, _ = next(fetcher)
    for counts in (progress.current, progress.total):
        for name in ("ready", "started", "processed", "completed"):
            setattr(counts, name, getattr(counts, name) + count)
    progress.is_last_batch = fetcher.done
    return batch
