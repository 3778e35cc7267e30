"""Our modules under Lightning's Trainer, one optimiser step at a time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_palm import PaLMConfig
from tests.benchmarks.inputs import Size
from tests.benchmarks.stepping import Steps

__all__ = ["config", "stepwise", "trainer", "written"]


def config(size: Size, **changes: Any) -> PaLMConfig:
    """Our network of this shape."""
    fields = {
        "vocab_size": size.vocab_size,
        "d_model": size.d_model,
        "num_layers": size.num_layers,
        "num_heads": size.num_heads,
        "head_dim": size.head_dim,
        "max_length": size.max_length,
    }
    return PaLMConfig(**{**fields, **changes})


def written(rows: Sequence[dict[str, Any]]) -> str:
    """A file of rows, for a data module."""
    path = Path(tempfile.mkdtemp()) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def trainer(precision: str = "32-true", callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """A Trainer that writes and prints nothing."""
    fields: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "precision": precision, "logger": False, "callbacks": list(callbacks),
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "default_root_dir": tempfile.mkdtemp(), "max_epochs": -1, "limit_val_batches": 0,
    }  # fmt: skip
    return Trainer(**{**fields, **options})


class Pause(Callback):
    """Waits after each optimiser step."""

    def __init__(self, pause: Callable[[], None]) -> None:
        self.pause = pause

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.pause()


def stepwise(build: Callable[[], tuple[LightningModule, Any]], precision: str, **options: Any) -> Steps:
    """A run that goes on when it is called."""

    def loop(pause: Callable[[], None]) -> None:
        torch.manual_seed(0)
        module, data = build()
        trainer(precision, [Pause(pause)], **options).fit(module, datamodule=data)

    return Steps(loop)
