"""How long a saving holds training up: between two steps, and beside them."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lit_palm import LitLanguageModel, TextData
from lit_palm.callbacks import LastCheckpoint
from tests.benchmarks.inputs import Size, token_ids
from tests.benchmarks.ours.running import config, trainer, written
from tests.benchmarks.worker import Work


class Timed(LastCheckpoint):
    """Notes how long training waits in it, where it saves."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.held: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        start, saved = time.perf_counter(), self._saved
        super().on_train_batch_end(trainer, *args)
        if self._saved != saved:
            self.held.append(time.perf_counter() - start)


def held(size: dict[str, int], savings: int, every: int, asynchronous: bool) -> Work:
    """The median seconds that training waits for a saving of weights and AdamW's state.

    Args:
        size: the network.
        savings: how many.
        every: steps between them, of one row of 64 tokens.
        asynchronous: they are written beside the steps.
    """

    def run() -> dict[str, Any]:
        torch.manual_seed(0)
        source = written([{"tokens": ids} for ids in token_ids(0, 8, 62).tolist()])
        data = TextData(train=source, batch_size=1, sequence_length=64, tokenizer="bytes")
        place = Path(tempfile.mkdtemp())
        keep = Timed(str(place), every_n_steps=every, asynchronous=asynchronous)
        fit = trainer(callbacks=[keep], max_steps=savings * every, enable_checkpointing=True)
        fit.fit(LitLanguageModel(config(Size(**size))), datamodule=data)
        saved = (place / "last.ckpt").stat().st_size
        return {"cost": statistics.median(keep.held), "longest": max(keep.held), "bytes": saved}

    return run
