"""Results as files: complete, parseable and only there when they are whole."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lit_palm.callbacks import MetricsFile, PredictionWriter


class Reports(LightningModule):
    """Logs a number in validation and predicts rows or columns."""

    def __init__(self, columns: bool = False) -> None:
        super().__init__()
        self.columns = columns

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/loss", batch.mean())

    def predict_step(self, batch: torch.Tensor, batch_idx: int):
        if self.columns:
            return {"score": batch, "text": [f"é {int(x)}" for x in batch], "absent": None}
        return [{"score": float(x), "text": f"é {int(x)}"} for x in batch]


def run(verb: str, module: LightningModule, callback, folder: Path) -> None:
    trainer = Trainer(accelerator="cpu", devices=1, default_root_dir=folder, logger=False, callbacks=[callback],
                      enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)  # fmt: skip
    getattr(trainer, verb)(module, DataLoader(torch.arange(4.0), batch_size=2))  # type: ignore[arg-type]


def test_metrics_are_the_latest_as_json(tmp_path) -> None:
    run("validate", Reports(), MetricsFile(str(tmp_path / "new" / "metrics.json")), tmp_path)
    assert json.loads((tmp_path / "new" / "metrics.json").read_text()) == {"step": 0, "val/loss": 1.5}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["metrics.json"]


def test_predictions_are_one_object_a_row(tmp_path) -> None:
    for columns in (False, True):
        path = tmp_path / f"{columns}.jsonl"
        run("predict", Reports(columns), PredictionWriter(str(path)), tmp_path)
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [{"score": float(i), "text": f"é {i}"} for i in range(4)]
        assert "é" in lines[0]
