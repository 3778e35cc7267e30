"""Runs on a stream that are killed after any step, or fail within one, and resume, through Lightning."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_palm.callbacks import MixtureShares
from lit_palm.data import StreamingTextData, TextSource
from lit_palm.testing.processes import Program
from tests.data.stream_files import shards
from tests.modules.test_resume import Deadly, Killed
from tests.support import adamw, config, everything, language_model, recorded, same, trainer

ROOT = Path(__file__).parents[2]


def job(folder: Path, accumulate: int = 1, **options: Any) -> tuple[Any, StreamingTextData]:
    """A step has four rows, of a mixture whose smaller source is repeated; with dropout."""
    fields: dict[str, Any] = {
        "sources": [
            TextSource(shards(folder, "a", 50, files=3), 0.7),
            TextSource(shards(folder, "b", 7, suffix=".parquet"), 0.3),
        ],
        "validation": shards(folder, "held", 5),
        "batch_size": 4 // accumulate,
        "num_streams": 4,
        "shuffle_buffer": 12,
        "sequence_length": 24,
        "num_workers": 0,
        "tokenizer": "bytes",
    }
    module = language_model(network=config(dropout=0.1), optimizer=adamw)
    return module, StreamingTextData(**{**fields, **options})


Result = tuple[dict[str, Any], list[Tensor]]


def run(
    folder: Path, flags: dict[str, Any], options: dict[str, Any], path: Any = None, callback: Callback | None = None
) -> Result:
    accumulate = flags.get("accumulate_grad_batches", 1)
    module, data = job(folder, accumulate, **options)
    runner = trainer(folder, callbacks=[callback] if callback else [], gradient_clip_val=0.5, **flags)
    with recorded(module) as batches:
        try:
            runner.fit(module, datamodule=data, ckpt_path=path)
        except Killed:
            return {}, batches
    return everything(runner), batches


@pytest.mark.parametrize(
    "flags, options",
    [
        ({"max_steps": 9, "val_check_interval": 2, "check_val_every_n_epoch": None}, {}),
        ({"max_steps": 9, "accumulate_grad_batches": 2}, {"batches_per_epoch": 5}),  # a short step ends an epoch
        ({"max_epochs": 3, "limit_train_batches": 3}, {}),
        ({"max_epochs": 2}, {"exhausted": "stop", "shuffle_buffer": 4}),
        ({"max_steps": 5, "accumulate_grad_batches": 4}, {"num_workers": 2, "shuffle_buffer": 1}),
    ],
    ids=["no end", "epochs", "limited", "passes", "workers"],
)
def test_a_run_killed_after_any_step_resumes_exactly(
    flags: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    expected, order = run(tmp_path, flags, options)
    steps = expected["step"]
    assert steps >= 5
    for step in range(1, steps, 1 + steps // 12):
        place = tmp_path / "killed"
        shutil.rmtree(place, ignore_errors=True)
        _, first = run(tmp_path, flags, options, callback=Deadly(str(place), every_n_steps=step))
        state, rest = run(tmp_path, flags, options, path=place / "last.ckpt")
        same(order, first + rest, f"killed after step {step}: batch ")
        same(expected, state, f"killed after step {step}: ")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_within_a_step_is_resumed_at_its_beginning(workers: int, tmp_path: Path) -> None:
    flags = {"max_steps": 5, "accumulate_grad_batches": 2}
    expected, order = run(tmp_path, flags, {"num_workers": workers})
    module, data = job(tmp_path, 2, num_workers=workers)
    runner = trainer(tmp_path, gradient_clip_val=0.5, **flags)
    original, count = module.training_step, itertools.count()

    def step(batch: Any, batch_idx: int) -> Tensor:
        if next(count) == 5:  # the second half of the third step
            raise Killed
        return original(batch, batch_idx)

    module.training_step = step
    with pytest.raises(Killed):
        runner.fit(module, datamodule=data)
    runner.save_checkpoint(tmp_path / "exception.ckpt")
    state, rest = run(tmp_path, flags, {"num_workers": workers}, path=tmp_path / "exception.ckpt")
    same(order[4:], rest)
    same(expected, state)


def test_a_run_that_ended_goes_on_with_more_steps(tmp_path: Path) -> None:
    expected, order = run(tmp_path, {"max_steps": 7}, {})
    module, data = job(tmp_path)
    runner = trainer(tmp_path, gradient_clip_val=0.5, max_steps=4)
    runner.fit(module, datamodule=data)
    runner.save_checkpoint(tmp_path / "end.ckpt")  # after the loader was closed
    state, rest = run(tmp_path, {"max_steps": 7}, {}, path=tmp_path / "end.ckpt")
    same(order[4:], rest)
    same(expected, state)


def test_shares_are_logged(tmp_path: Path) -> None:
    module, data = job(tmp_path)
    data.mixture[0].name, data.mixture[1].name = "large", "small"
    runner = trainer(tmp_path, max_steps=40, callbacks=[MixtureShares()])
    runner.fit(module, datamodule=data)
    logged = {name: float(value) for name, value in runner.callback_metrics.items() if name.startswith("data/")}
    assert logged["data/share/large"] + logged["data/share/small"] == pytest.approx(1)
    assert 0.5 < logged["data/share/large"] < 0.85  # a draw is a large part of so few tokens
    assert logged["data/epoch/small"] > logged["data/epoch/large"]


def test_a_stream_without_an_end_needs_one(tmp_path: Path) -> None:
    module, data = job(tmp_path)
    with pytest.raises(ValueError, match="this stream has no end"):
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)
    module, data = job(tmp_path)
    with pytest.raises(ValueError, match=r"trainer\.overfit_batches repeats batches"):
        trainer(tmp_path, max_steps=1, overfit_batches=2).fit(module, datamodule=data)
    module, data = job(tmp_path, sequence_length=65)
    with pytest.raises(ValueError, match=r"data\.sequence_length is 65, but the network's context is 64"):
        trainer(tmp_path, max_steps=1).fit(module, datamodule=data)


def test_a_resume_in_another_order_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "killed"
    run(tmp_path, {"max_steps": 4}, {}, callback=Deadly(str(place), every_n_steps=2))
    with pytest.raises(ValueError, match=r"data\.seed is 3, and was 0"):
        run(tmp_path, {"max_steps": 4}, {"seed": 3}, path=place / "last.ckpt")


PROCESSES = """
import sys
from pathlib import Path
import torch
from tests.data.test_streaming_resume import job
from tests.modules.test_resume import Deadly, Killed
from tests.support import trainer

folder, path = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
module, data = job(folder, 2, exhausted="stop", num_workers=1)
callback = [] if path else [Deadly(str(folder / "two"), every_n_steps=3)]
runner = trainer(folder, strategy="ddp", devices=2, max_epochs=1, callbacks=callback, gradient_clip_val=0.5)
batches, original = [], module.training_step


def step(batch, batch_idx):
    batches.append(batch["tokens"][batch["loss_mask"].any(1)])  # without the row that a rank with nothing serves
    return original(batch, batch_idx)


module.training_step = step
try:
    runner.fit(module, datamodule=data, ckpt_path=path)
except Killed:
    pass
torch.save(batches, folder / f"{'rest' if path else 'first'}{runner.global_rank}.pt")
"""


def test_two_processes_share_a_stream_and_end_together(tmp_path: Path) -> None:
    _, order = run(tmp_path, {"max_epochs": 1}, {"exhausted": "stop"})
    (tmp_path / "shared_stream.py").write_text(PROCESSES)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for arguments in ([], [str(tmp_path / "two" / "last.ckpt")]):
        given = [str(tmp_path), *arguments]
        result = Program("shared_stream", given, tmp_path / "log", environment, tmp_path, ranks=2).finish(240)
        assert result.returncode == 0 or (tmp_path / "first1.pt").exists(), result.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"first{r}.pt") + torch.load(tmp_path / f"rest{r}.pt") for r in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(order)
    for together, one, other in zip(order, *ranks, strict=True):
        rows = {tuple(row.tolist()) for row in together}
        assert rows == {tuple(row.tolist()) for part in (one, other) for row in part}
