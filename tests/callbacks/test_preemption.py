"""A signal to one rank or all: the run saves after the step, stops, and goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lit_palm.callbacks import LastCheckpoint, Preemption
from lit_palm.callbacks.preemption import STATUS
from tests.callbacks.runs import Run
from tests.support import (
    everything,
    language_model,
    policy,
    prompt_data,
    ranking_data,
    reward_model,
    same,
    text_data,
    trainer,
)


class Kick(LastCheckpoint):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, folder: Path, step: int, number: int = signal.SIGTERM) -> None:
        super().__init__(str(folder))
        self.step, self.number = step, number

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


JOBS: dict[str, Any] = {
    "language model": lambda folder: (language_model(), text_data(folder, batch_size=2)),
    "reward model": lambda folder: (reward_model(calibrate="whiten"), ranking_data(folder)),
    "policy": lambda folder: (policy(), prompt_data(folder)),
}


@pytest.mark.parametrize("name, step, flags", [
    ("language model", 2, {"accumulate_grad_batches": 2, "max_steps": 6}),
    ("reward model", 2, {"max_steps": 5}),  # after the third step an epoch ends, and its validation calibrates
    ("policy", 4, {"max_epochs": 2}),  # the first step of a collection
])  # fmt: skip
def test_a_run_that_was_told_to_stop_goes_on_exactly(
    name: str, step: int, flags: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(place: str, kick: int, path: Any = None) -> Any:
        module, data = JOBS[name](tmp_path)
        run = trainer(tmp_path, callbacks=[Preemption(), Kick(tmp_path / place, kick)], **flags)
        run.fit(module, datamodule=data, ckpt_path=path)
        return run

    before = signal.getsignal(signal.SIGTERM)
    straight = run("straight", -1)
    assert not hasattr(straight, "exit_status")
    stopped = run("stopped", step)
    path = tmp_path / "stopped" / "last.ckpt"
    assert stopped.global_step == step + 1 and stopped.exit_status == STATUS
    assert f"stopped by SIGTERM after step {step + 1}; saved {path}" in capsys.readouterr().err
    same(everything(straight), everything(run("stopped", -1, path)))
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_chosen_signals_and_no_other(tmp_path: Path) -> None:
    seen: list[int] = []
    previous = signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    try:
        run = trainer(tmp_path, callbacks=[Preemption(["SIGUSR1"]), Kick(tmp_path, 1, signal.SIGUSR2)], max_steps=3)
        run.fit(language_model(), datamodule=text_data(tmp_path))
        assert run.global_step == 3 and seen == [signal.SIGUSR2]
        run = trainer(tmp_path, callbacks=[Preemption(["SIGUSR1"]), Kick(tmp_path, 1, signal.SIGUSR1)], max_steps=3)
        run.fit(language_model(), datamodule=text_data(tmp_path))
        assert run.global_step == 2
    finally:
        signal.signal(signal.SIGUSR2, previous)


@pytest.mark.parametrize("array", [False, True])
def test_slurm_runs_the_job_again_once(array: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Lightning's environment would save in its handler and requeue, too
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nls {tmp_path}/last.ckpt >> {tmp_path}/calls\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    for name, value in {"JOB_ID": "42", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    if array:
        monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    environment = SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR2)
    callbacks = [Preemption(), Kick(tmp_path, 1, signal.SIGUSR2)]
    run = trainer(tmp_path, callbacks=callbacks, plugins=[environment], max_steps=3)
    run.fit(language_model(), datamodule=text_data(tmp_path))
    assert run.exit_status == STATUS
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"requeue {'40_2' if array else '42'}", f"{tmp_path}/last.ckpt"
    ]  # fmt: skip
    assert not list(tmp_path.glob("hpc_ckpt*"))


def test_a_requeueing_that_fails_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    run = trainer(tmp_path, callbacks=[Preemption(), Kick(tmp_path, 0)], max_steps=3)
    run.fit(language_model(), datamodule=text_data(tmp_path))
    assert "`scontrol requeue 42` failed" in capsys.readouterr().err and run.exit_status == STATUS


def two(folder: Path, **more: Any) -> Run:
    guards = {"Preemption": {}, "LastCheckpoint": {"dirpath": str(folder / "kept")}, "Watchdog": {}}
    flags = {"max_epochs": 3, "gradient_clip_val": 0.5}
    return Run(folder, {"job": "policy", "devices": 2, "guards": guards, "flags": flags, "result": "end.pt", **more})


def told(folder: Path, **more: Any) -> None:
    """Two processes, of which the second alone gets the signal, in the middle of a collection."""
    run = two(folder, slow=0.3, **more)
    run.reaches("collection 1", 1)
    os.kill(run.pid(1), signal.SIGTERM)
    assert run.ends(60) == STATUS, run.stderr
    assert "stopped by SIGTERM after step 5" in run.stderr and run.vanishes()
    assert (folder / "kept" / "last.ckpt").exists()


def test_one_rank_of_two_is_told_and_both_stop(tmp_path: Path) -> None:
    told(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_processes_go_on_exactly(strategy: str, tmp_path: Path) -> None:
    straight, broken = two(tmp_path / "a", strategy=strategy), tmp_path / "b"
    assert straight.ends(90) == 0, straight.stderr
    told(broken, strategy=strategy)
    again = two(broken, strategy=strategy, resume=str(broken / "kept" / "last.ckpt"))
    assert again.ends(90) == 0, again.stderr
    same(torch.load(tmp_path / "a" / "end.pt"), torch.load(broken / "end.pt"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"signals": ["SIGNOPE"]}, "Preemption: signals"),
        ({"signals": []}, "Preemption: signals"),
        ({"signals": ["SIGKILL"]}, "nobody can handle SIGKILL"),
        ({"every_n_steps": 0}, "every_n_steps is 0"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preemption(**arguments)


def test_without_a_checkpoint_callback_it_is_refused_before_training(tmp_path: Path) -> None:
    run = trainer(tmp_path, callbacks=[Preemption()], enable_checkpointing=False, max_steps=2)
    with pytest.raises(ValueError, match="this run has none: add LastCheckpoint"):
        run.fit(language_model(), datamodule=text_data(tmp_path))
