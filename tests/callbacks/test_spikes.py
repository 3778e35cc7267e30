"""A real spike of the loss: the run goes back, leaves the data out, and resumes exactly from any step of all this."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lit_palm.callbacks import LastCheckpoint, SpikeRewind
from lit_palm.modules.reference import ReferenceUpdate
from lit_palm.optim import CosineWithWarmup
from lit_palm.types import Experience, Loss, Output
from tests.callbacks.guarded_run import Shock
from tests.callbacks.runs import Run
from tests.support import (
    apart,
    everything,
    language_model,
    policy,
    preference_policy,
    prompt_data,
    ranking_data,
    recorded,
    same,
    text_data,
    trainer,
)

SMALL = {"rewind_steps": 3, "skip_batches": 8, "snapshot_every": 2, "patience": 2, "window": 5, "warmup": 0}


class Watch(Callback):
    """What a run did: the state after every optimiser step, and the steps and batches in order."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self.batches: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.batches.append(int(trainer.fit_loop.epoch_loop.batch_progress.total.ready))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if pl_module.between_steps:
            self.states.append(everything(trainer))


class Killed(Exception):
    pass


class Deadly(LastCheckpoint):
    """Saves after so many batches of this process, and dies."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(str(folder))
        self.count = count

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        self.count -= 1
        if self.count == 0:
            self._save(trainer)
            raise Killed


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return CosineWithWarmup(optimizer, warmup_steps=2, max_steps=40)


def make(folder: Path, job: str = "language model") -> tuple[Any, Any]:
    if job == "preferences":
        module = preference_policy(reference_update=ReferenceUpdate(mix=0.3, every=2), scheduler=cosine)
        return module, ranking_data(folder, count=40, batch_size=2)
    return language_model(scheduler=cosine), text_data(folder, count=60, batch_size=2)


def run(
    folder: Path, guard: SpikeRewind, *more: Any, job: str = "language model", path: Any = None, **flags: Any
) -> Any:
    module, data = make(folder, job)
    run = trainer(folder, callbacks=[guard, *more], **{"max_steps": 16, "gradient_clip_val": 0.5, **flags})
    with recorded(module) as batches, contextlib.suppress(Killed):
        run.fit(module, datamodule=data, ckpt_path=path)
    return run, batches


def test_it_goes_back_and_leaves_the_data_out(tmp_path: Path) -> None:
    guard, watch = SpikeRewind(str(tmp_path / "snapshots"), **SMALL), Watch()
    _, batches = run(tmp_path, guard, Shock(11), watch)
    # steps 11 and 12 are above, so the spike begins after step 10; three steps and more back is the snapshot of step 6
    assert guard.rewinds == 1
    assert watch.batches == [*range(1, 13), *range(15, 25)]  # 13 and 14 are left out after 12: 8 since batch 6
    steps = [state["step"] for state in watch.states]
    assert steps == [*range(1, 12), 6, *range(7, 17)]
    same(watch.states[5], watch.states[11])
    plain, order = run(tmp_path, SpikeRewind(str(tmp_path / "none"), **SMALL), max_steps=30)
    same([order[n - 1] for n in watch.batches], batches)
    assert plain.callback_metrics["guard/rewinds"] == 0
    # what is on disk is what it needs
    assert len(list((tmp_path / "snapshots").iterdir())) <= 5


@pytest.mark.parametrize(
    "job, accumulate, shock, options",
    [
        ("language model", 1, 11, {}),
        ("language model", 2, 15, {"skip_batches": 11}),  # within an epoch and its windows
        ("language model", 1, 24, {"skip_batches": 20}),  # the rest of an epoch, and the first batches of the next
        ("preferences", 1, 13, {}),  # with a reference that moves, and an epoch's end
    ],
)
def test_killed_and_resumed_it_goes_on_exactly(
    job: str, accumulate: int, shock: int, options: dict, tmp_path: Path
) -> None:
    flags = {"accumulate_grad_batches": accumulate, "job": job, "max_steps": 26 // accumulate + 4}

    def guard() -> SpikeRewind:
        return SpikeRewind(str(tmp_path / "snapshots"), **{**SMALL, **options})

    whole = guard()
    watch = Watch()
    straight, order = run(tmp_path, whole, Shock(shock), watch, **flags)
    assert whole.rewinds == 1
    unspoiled = SpikeRewind(str(tmp_path / "none"), **SMALL)
    _, everything_in_order = run(tmp_path, unspoiled, **flags | {"max_steps": 50})
    same([everything_in_order[n - 1] for n in watch.batches], order)
    number = next(n for n, (a, b) in enumerate(zip(watch.batches, watch.batches[1:], strict=False)) if b > a + 1) + 1
    # around the spike, and long after it, when what it needed has been thrown away in a future that is lost
    for kill in {number - 3, number, number + 1, number + 2, len(order) - 1}:
        _, first = run(tmp_path, guard(), Shock(shock), Deadly(tmp_path / "kept", kill), **flags)
        last = guard()
        resumed, rest = run(tmp_path, last, Shock(shock), path=tmp_path / "kept" / "last.ckpt", **flags)
        done = kill - kill % accumulate
        same(order, first[:done] + rest, f"killed after {kill}: batch ")
        same(everything(straight), everything(resumed), f"killed after {kill}: ")
        assert last.state_dict() == whole.state_dict()


def test_a_run_killed_after_the_spike_meets_it_again_from_an_older_checkpoint(tmp_path: Path) -> None:
    def guard() -> SpikeRewind:
        return SpikeRewind(str(tmp_path / "snapshots"), **SMALL)

    class Saves(LastCheckpoint):
        """Saves at step 10 alone, and dies long after."""

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.fit_loop.epoch_loop.batch_progress.total.ready == 10:
                self._save(trainer)
            if trainer.global_step == 20:
                raise Killed

    straight, _ = run(tmp_path, guard(), Shock(11), max_steps=24)
    run(tmp_path, guard(), Shock(11), Saves(str(tmp_path / "kept")), max_steps=24)
    again = guard()
    resumed, _ = run(tmp_path, again, Shock(11), path=tmp_path / "kept" / "last.ckpt", max_steps=24)
    assert again.rewinds == 1
    same(everything(straight), everything(resumed))


def test_a_loss_that_is_no_number_is_a_spike_too(tmp_path: Path) -> None:
    module, data = make(tmp_path)
    original = module.objective.loss
    guard = SpikeRewind(str(tmp_path / "snapshots"), **SMALL)

    def loss(output: Output, batch: Experience) -> Loss:
        found = original(output, batch)
        bad = module.trainer.fit_loop.epoch_loop.batch_progress.total.ready in (11, 12)
        return Loss(found.total * float("nan")) if bad else found

    module.objective.loss = loss
    trainer(tmp_path, callbacks=[guard], max_steps=14).fit(module, datamodule=data)
    assert guard.rewinds == 1 and module.finite.skipped == 2


def test_too_many_end_the_run_with_the_reason(tmp_path: Path) -> None:
    guard = SpikeRewind(str(tmp_path / "snapshots"), **SMALL, max_rewinds=1)
    with pytest.raises(RuntimeError, match=r"SpikeRewind: at step .* after 1 rewinds, which is max_rewinds"):
        run(tmp_path, guard, Shock(11, 22), max_steps=30)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_processes_go_back_together_and_resume_exactly(strategy: str, tmp_path: Path) -> None:
    def start(folder: Path, devices: int, steps: int, **more: Any) -> Run:
        guards = {
            "SpikeRewind": {"dirpath": str(folder / "snapshots"), **SMALL},
            "LastCheckpoint": {"dirpath": str(folder / "kept")},
        }
        settings = {"guards": guards, "devices": devices, "shocks": [11], "result": "end.pt"}
        flags = {"max_steps": steps, "gradient_clip_val": 0.5}
        data = {"count": 60, "batch_size": 4 // devices}
        return Run(folder, {**settings, "flags": flags, "data": data, "strategy": more.pop("strategy", "auto"), **more})

    one, straight = start(tmp_path / "one", 1, 16), start(tmp_path / "a", 2, 16, strategy=strategy)
    for run in (one, straight):
        assert run.ends(150) == 0, run.stderr
        assert len(run.lines("went back to step 6 and leaves out 2 more batches")) == 1, run.stderr
    ends = [torch.load(run.folder / "end.pt") for run in (one, straight)]
    assert ends[0]["step"] == ends[1]["step"] == 16
    assert apart(ends[0]["weights"], ends[1]["weights"]) < 2e-5
    # broken off long after it went back
    broken = start(tmp_path / "b", 2, 14, strategy=strategy)
    assert broken.ends(150) == 0, broken.stderr
    again = start(tmp_path / "b", 2, 16, strategy=strategy, resume=str(tmp_path / "b" / "kept" / "last.ckpt"))
    assert again.ends(150) == 0, again.stderr
    same(ends[1], torch.load(tmp_path / "b" / "end.pt"))
    names = sorted(path.name for path in (tmp_path / "b" / "snapshots").iterdir())
    assert {name[-9:] for name in names} == {"-rank0.pt", "-rank1.pt"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rewind_steps": 0}, "rewind_steps is 0; it must be at least 1"),
        ({"skip_batches": -1}, "skip_batches is -1"),
        ({"snapshot_every": 0}, "snapshot_every is 0"),
        ({"deviations": 0.0}, "deviations is 0.0; it must be positive"),
        ({"patience": 0}, "patience is 0"),
        ({"window": 2}, "window is 2; it must be at least 5"),
        ({"warmup": -1}, "warmup is -1"),
        ({"max_rewinds": -1}, "max_rewinds is -1"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpikeRewind("snapshots", **arguments)


def test_where_it_makes_no_sense_it_is_refused_before_training(tmp_path: Path) -> None:
    one = trainer(tmp_path, callbacks=[SpikeRewind(str(tmp_path))], max_steps=1)
    with pytest.raises(ValueError, match="PPO samples its own: use CollapseGuard"):
        one.fit(policy(), datamodule=prompt_data(tmp_path))
    two = trainer(tmp_path, callbacks=[SpikeRewind(str(tmp_path))], max_steps=1)
    with pytest.raises(ValueError, match="skip_batches 300 would leave out a whole epoch"):
        two.fit(language_model(), datamodule=text_data(tmp_path))
    assert two.global_step == 0
