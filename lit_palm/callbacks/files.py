"""Results as files that other programs read: the latest metrics as JSON, predictions and rollouts as jsonl."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

__all__ = ["MetricsFile", "PredictionWriter", "RolloutWriter"]


def replace_text(path: Path, text: str) -> None:
    """Replace the file at once, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


class MetricsFile(Callback):
    """Writes the latest value of every logged metric as one JSON object, after validation, test and training.

    Args:
        path: the file to write.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def _save(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            values = {k: float(v) for k, v in sorted(trainer.callback_metrics.items())}
            replace_text(self.path, json.dumps({"step": trainer.global_step, **values}, indent=2) + "\n")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)


class PredictionWriter(Callback):
    """Writes what `predict` returns as jsonl, one object a row; the file appears when all rows are there.

    With several ranks, each writes a file of its own, named by its rank.

    Args:
        path: the file to write.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._lines: list[str] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._lines = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._lines += [json.dumps(row, ensure_ascii=False) for row in _rows(outputs)]

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self.path
        if trainer.world_size > 1:
            path = path.with_name(f"{path.stem}.{trainer.global_rank}{path.suffix}")
        replace_text(path, "".join(line + "\n" for line in self._lines))


class RolloutWriter(Callback):
    """Writes what a policy samples while it trains: one jsonl file a collection, one completion a line.

    A line has `prompt`, `completion`, `ended`, `num_tokens`, `score`, `rewards` by name, `row`, `group` (the prompt's
    number), and `kept`: whether the objective learns from it. Where an objective rejects samples and others take their
    place, those are written that took part; where it rejects everything, those of the last round. A collection that is
    sampled again, because a run was interrupted, replaces its file.

    Args:
        folder: gets collection-00000.jsonl and so on.
        every: write every so many collections.
    """

    def __init__(self, folder: str, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"RolloutWriter: every is {every}; it must be at least 1")
        self.folder, self.every = Path(folder), every

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rollouts = getattr(pl_module, "rollouts", None)
        if rollouts is None:
            raise ValueError(
                "RolloutWriter writes what a policy samples while it trains, and this run does not sample: leave it out"
            )
        rollouts.record = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        found, pl_module.rollouts.records = pl_module.rollouts.records, None
        if found is None or not trainer.is_global_zero or found[0] % self.every:
            return
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in found[1]]
        replace_text(self.folder / f"collection-{found[0]:05d}.jsonl", "".join(lines))


def _rows(outputs: Any) -> Iterator[dict[str, Any]]:
    """Rows of a list of rows, or of a dictionary of columns."""
    if isinstance(outputs, dict):
        columns = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in outputs.items() if v is not None}
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))
    else:
        yield from outputs or []
