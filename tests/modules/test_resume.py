"""A run that is killed after any optimiser step and resumed ends with the same bits as one that was never stopped.

Compared are weights, buffers (a reward model's calibration), optimiser, schedules, the objective's state and the
tokens of every batch in order. The short form takes the settings in which something once went wrong; the whole
(`pytest -m slow`) takes every job with every way of counting, accumulating and validating.
"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_palm.callbacks import LastCheckpoint
from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.modules.reference import ReferenceUpdate
from lit_palm.optim import CosineWithWarmup
from lit_palm.testing.processes import Program
from tests.support import (
    config,
    everything,
    language_model,
    policy,
    preference_policy,
    prompt_data,
    ranking_data,
    recorded,
    reward_model,
    same,
    selective_policy,
    text_data,
    trainer,
)

ROOT = Path(__file__).parents[2]


class Killed(Exception):
    """Nothing after the saving runs, as after a power cut."""


class Deadly(LastCheckpoint):
    def _save(self, trainer: Trainer) -> None:
        super()._save(trainer)
        raise Killed


class Keeps(LastCheckpoint):
    """Saves after every step and keeps it all, with how many batches there had been."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), every_n_steps=1, keep_last=1000)
        self.batches: list[Tensor] = []
        self.counts: dict[int, int] = {}

    def _save(self, trainer: Trainer) -> None:
        super()._save(trainer)
        self.counts.setdefault(trainer.global_step, len(self.batches))


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return CosineWithWarmup(optimizer, warmup_steps=2, max_steps=20)


def job(name: str, folder: Path, accumulate: int) -> tuple[Any, Any]:
    """Module and data; a step always has four rows."""
    if name == "language model":  # six batches an epoch, shuffled, dropout, a schedule
        module = language_model(network=config(dropout=0.1), scheduler=cosine)
        return module, text_data(folder, batch_size=4 // accumulate)
    if name == "reward model":  # three batches an epoch, calibrated at each validation
        return reward_model(calibrate="whiten"), ranking_data(folder, batch_size=4 // accumulate)
    if name == "selection":  # sixteen rows a collection at most, of which twelve, six, four, ... are kept
        return selective_policy(rollout={"minibatch_size": 4 // accumulate}), prompt_data(folder)
    if name == "moving reference":  # three steps an epoch, the reference moves after every second
        module = preference_policy(reference_update=ReferenceUpdate(mix=0.3, every=2))
        return module, ranking_data(folder, batch_size=4 // accumulate)
    # four minibatches a collection in two passes; adaptive KL, running moments; `early stop`: most of them unused
    stop = {"max_update_kl": 2e-3} if name == "early stop" else {}
    return policy(ppo=stop, rollout={"minibatch_size": 4 // accumulate}), prompt_data(folder)


Result = tuple[dict[str, Any], list[Tensor]]


class Runs:
    """Runs of one job under one set of Trainer flags."""

    def __init__(self, name: str, folder: Path, accumulate: int = 1, **flags: Any) -> None:
        self.name, self.folder, self.accumulate = name, folder, accumulate
        self.flags = {"gradient_clip_val": 0.5, "accumulate_grad_batches": accumulate, **flags}

    def run(self, path: Path | None = None, callback: Any = None, **flags: Any) -> Result:
        module, data = job(self.name, self.folder, self.accumulate)
        run = trainer(self.folder, callbacks=[callback] if callback else [], **{**self.flags, **flags})
        with recorded(module) as batches:
            if isinstance(callback, Keeps):
                callback.batches = batches
            try:
                run.fit(module, datamodule=data, ckpt_path=path)
            except Killed:
                return {}, batches
        return everything(run), batches

    def straight(self) -> Result:
        return self.run()

    def resumed(self, kept: Keeps, step: int, order: list[Tensor]) -> Result:
        """Resumed from what a run kept after a step; with the batches until then, those of a run cut off there."""
        state, rest = self.run(self.folder / "kept" / f"step-{step:08d}.ckpt")
        return state, order[: kept.counts[step]] + rest

    def prolonged(self, **shorter: Any) -> Result:
        """Run to an earlier end, then resumed from the checkpoint that its end left."""
        place = self.folder / "ended"
        shutil.rmtree(place, ignore_errors=True)
        _, first = self.run(callback=LastCheckpoint(str(place)), **shorter)
        state, rest = self.run(place / "last.ckpt")
        return state, first + rest


def check(runs: Runs, *, stride: int = 1) -> None:
    expected, order = runs.straight()
    steps = expected["step"]
    assert steps >= 4
    # what a run publishes after a step is the same whether or not it is killed then: one run leaves all of it
    kept = Keeps(runs.folder / "kept")
    state, batches = runs.run(callback=kept)
    same(expected, state, "saved after every step: ")
    same(order, batches, "saved after every step: batch ")
    # after the very last step there is nothing left to resume but a validation, which Lightning then leaves out
    for step in range(1, steps, stride):
        state, batches = runs.resumed(kept, step, order)
        same(expected, state, f"resumed after step {step}: ")
        same(order, batches, f"resumed after step {step}: batch ")
    shorter = (
        [{"max_steps": s} for s in range(1, steps, 2 * stride)]
        if "max_steps" in runs.flags
        else [{"max_epochs": e} for e in range(1, runs.flags["max_epochs"])]
    )
    for flags in shorter:
        state, batches = runs.prolonged(**flags)
        same(expected, state, f"ended at {flags}: ")
        same(order, batches, f"ended at {flags}: batch ")


WITHIN = {"val_check_interval": 2, "check_val_every_n_epoch": None}


@pytest.mark.parametrize(
    "name, accumulate, flags",
    [
        ("language model", 2, {"max_steps": 8, **WITHIN}),  # an epoch has six steps: through its end, and in its middle
        # three steps an epoch: a validation is due after each sixth, and the run ends before another would calibrate
        ("reward model", 1, {"max_steps": 8}),
        ("policy", 1, {"max_epochs": 2}),  # one pass, the other, the next collection
        ("policy", 4, {"max_steps": 6, **WITHIN}),
        ("policy", 1, {"max_epochs": 3, "limit_train_batches": 2}),  # half of each collection is left unused
        ("early stop", 1, {"max_epochs": 3}),
        ("early stop", 1, {"max_steps": 6, **WITHIN}),
        ("selection", 1, {"max_epochs": 3}),  # six steps, four, two
        ("selection", 2, {"max_steps": 11, **WITHIN}),
        ("moving reference", 2, {"max_steps": 7}),
    ],
)
def test_resume_is_exact(name: str, accumulate: int, flags: dict[str, Any], tmp_path: Path) -> None:
    check(Runs(name, tmp_path, accumulate, **flags))


@pytest.mark.slow
@pytest.mark.parametrize("validation", [{}, WITHIN], ids=["epoch", "within"])
@pytest.mark.parametrize("length", [{"max_steps": 9}, {"max_epochs": 2}], ids=["steps", "epochs"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("name", ["language model", "reward model", "policy", "early stop", "selection"])
def test_resume_is_exact_whole(
    name: str, accumulate: int, length: dict[str, Any], validation: dict[str, Any], tmp_path: Path
) -> None:
    check(Runs(name, tmp_path, accumulate, **length, **validation))


def test_accumulation_that_does_not_divide_the_collection(tmp_path: Path) -> None:
    # eight minibatches, windows of three: the last step of a collection is a short one
    runs = Runs("policy", tmp_path, 2, max_epochs=2)
    runs.flags["accumulate_grad_batches"] = 3
    check(runs)


@pytest.mark.parametrize("name", ["language model", "policy"])
def test_an_exception_within_a_step_is_resumed_at_its_beginning(name: str, tmp_path: Path) -> None:
    runs = Runs(name, tmp_path, 2, max_epochs=2)
    expected, order = runs.straight()
    module, data = job(name, tmp_path, 2)
    run = trainer(tmp_path, **runs.flags)
    original, count = module.training_step, itertools.count()

    def step(batch: Any, batch_idx: int) -> Tensor:
        if next(count) == 5:  # the second half of the third step
            raise Killed
        return original(batch, batch_idx)

    module.training_step = step
    with pytest.raises(Killed):
        run.fit(module, datamodule=data)
    run.save_checkpoint(tmp_path / "exception.ckpt")
    state, rest = runs.run(tmp_path / "exception.ckpt")
    same(expected, state)
    same(order[4:], rest)


def test_checkpoints_of_lightning_resume_exactly_too(tmp_path: Path) -> None:
    # saved in three hooks: after a batch, after validation, at an epoch's end
    runs = Runs("policy", tmp_path, 1, max_epochs=3)
    expected, _ = runs.straight()
    for number, options in enumerate(
        [
            {"every_n_train_steps": 3},
            {"monitor": "val/reward", "mode": "max", "save_on_train_epoch_end": False},
            {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        ]
    ):
        place = tmp_path / str(number)
        runs.run(callback=ModelCheckpoint(place, save_top_k=-1, **options))
        files = sorted(place.glob("*.ckpt"))
        assert len(files) >= 2
        for file in files:
            state, _ = runs.run(file)
            same(expected, state, f"{file.name} of {options}: ")


def test_the_calibration_at_the_end_is_in_the_last_checkpoint(tmp_path: Path) -> None:
    # the step's checkpoint is written before the validation that calibrates, training's end after it
    runs = Runs("reward model", tmp_path, 1, max_epochs=2)
    state, _ = runs.run(callback=LastCheckpoint(str(tmp_path / "ended"), every_n_steps=3))
    saved = read_checkpoint(tmp_path / "ended" / "last.ckpt").state_dict["networks.reward.offset"]
    assert saved != 0 and saved == state["weights"]["networks.reward.offset"]


def test_the_step_that_loggers_see_goes_on(tmp_path: Path) -> None:
    # one value of the axis for every optimiser step, whatever Lightning's counter says after a restart
    steps: list[int] = []

    class Steps(LastCheckpoint):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            steps.append(trainer.fit_loop.epoch_loop._batches_that_stepped)

    runs = Runs("reward model", tmp_path, 1, max_epochs=1)
    runs.run(callback=Steps(str(tmp_path / "ended")))
    steps.clear()
    runs.run(tmp_path / "ended" / "last.ckpt", callback=Steps(str(tmp_path / "more")), max_epochs=3)
    # Lightning's callbacks come before the module's own hook, so the first value is still Lightning's
    assert steps[1:] == [4, 5, 6, 7, 8]


def test_kill_9_then_resume_equals_straight(tmp_path: Path) -> None:
    path = tmp_path / "killed" / "last.ckpt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = Program("tests.modules.endless_run", [str(tmp_path)], tmp_path / "log", environment, ROOT)
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run made no checkpoint"
        time.sleep(0.01)
    time.sleep(0.2)  # some steps later, at no particular place
    process.kill()
    step = read_checkpoint(path) and torch.load(path, weights_only=True)["global_step"]
    runs = Runs("policy", tmp_path, 2, max_steps=step + 5)
    expected, _ = runs.straight()
    state, _ = runs.run(path)
    same(expected, state)


def test_resuming_with_other_sizes_says_what_will_not_fit(tmp_path: Path) -> None:
    runs = Runs("policy", tmp_path, 1, max_epochs=2)
    runs.run(callback=Deadly(str(tmp_path / "killed"), every_n_steps=2))
    module, data = job("policy", tmp_path, 2)
    with pytest.raises(ValueError, match="in the middle of a collection of 8 rows in minibatches of 4"):
        trainer(tmp_path, max_epochs=2).fit(module, datamodule=data, ckpt_path=tmp_path / "killed" / "last.ckpt")
