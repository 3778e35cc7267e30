"""How long a saving holds training up: between two steps, and beside them.

    python -m tests.benchmarks.saving              # 30M parameters with AdamW's state, about 360 MB; runs/saving.json
    python -m tests.benchmarks.saving --short      # a tiny network, to see that it runs

The shape is that of `speed.py`: d 512, 8 layers, 8 heads of 64, 256 ids. What is measured is the time in the callback
after a step that saves, and how much longer the steps of a run with savings take in all. The bound when somebody reads
the table: 0.1 s in the callback with `asynchronous` (nothing here fails on a time).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lit_palm.callbacks import LastCheckpoint
from lit_palm.models.palm import PaLMConfig
from lit_palm.modules import LitLanguageModel
from tests.support import text_data, trainer


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


class Clock(Callback):
    """When each step of a run was over, from the second on."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.times.append(time.perf_counter())


def measure(folder: Path, network: PaLMConfig, steps: int, every: int | None, asynchronous: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    place = folder / "run"
    keep = Timed(str(place), every_n_steps=every, asynchronous=asynchronous)
    clock = Clock()
    run = trainer(folder, callbacks=[clock, keep], max_steps=steps, max_epochs=-1, limit_val_batches=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(LitLanguageModel(network), datamodule=text_data(folder, batch_size=1, sequence_length=64))
    size = (place / "last.ckpt").stat().st_size
    return {"held": keep.held, "seconds": clock.times[-1] - clock.times[2], "bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a tiny network")
    parser.add_argument("--folder", type=Path, help="write on this disk; a temporary folder")
    parser.add_argument("--output", type=Path, default=Path("runs/saving.json"))
    arguments = parser.parse_args()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sizes = {"d_model": 32, "num_layers": 1, "num_heads": 2, "head_dim": 16} if arguments.short else {}
    steps, every = (6, 2) if arguments.short else (20, 4)
    results: dict[str, Any] = {}
    ways: list[tuple[str, int | None, bool]] = [
        ("none", None, False),
        ("between", every, False),
        ("beside", every, True),
    ]
    for name, often, asynchronous in ways:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            network = PaLMConfig(**{"d_model": 512, "num_layers": 8, "num_heads": 8, "head_dim": 64, **sizes})
            results[name] = measure(Path(folder), network, steps, often, asynchronous)
    count = len(results["beside"]["held"])
    print(f"{results['beside']['bytes'] / 1e6:.0f} MB, {count} savings, one every {every} steps of "
          f"{results['none']['seconds'] / (steps - 3):.3f} s")  # fmt: skip
    for name in ("between", "beside"):
        held = results[name]["held"]
        longer = (results[name]["seconds"] - results["none"]["seconds"]) / count
        results[name] |= {"median": statistics.median(held), "longest": max(held), "longer": longer}
        print(f"{name:8} steps: held {statistics.median(held):.3f} s (first {held[0]:.3f}, longest {max(held):.3f}), "
              f"training {longer:.3f} s longer a saving")  # fmt: skip
    results["ratio"] = results["between"]["median"] / results["beside"]["median"]
    print(f"ratio of the medians {results['ratio']:.1f}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
