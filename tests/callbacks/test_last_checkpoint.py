"""The checkpoints that a run leaves: which there are, what is in them, and what happens when they cannot be written."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_palm.callbacks import LastCheckpoint
from lit_palm.callbacks.run_lock import LOCK
from lit_palm.callbacks.snapshot import Buffers
from lit_palm.modules import storage
from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.modules.weights import load_network
from tests.support import everything, language_model, policy, prompt_data, same, text_data, trainer


def fit(folder: Path, callback: Any, path: Any = None, **flags: Any) -> Trainer:
    """A language model, six steps an epoch; everything that matters is in the trainer."""
    callbacks = callback if isinstance(callback, list) else [callback]
    run = trainer(folder, callbacks=callbacks, **{"max_steps": 6, **flags})
    run.fit(language_model(), datamodule=text_data(folder), ckpt_path=path)
    return run


def seen(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


def step_in(path: Path | str) -> int:
    with fsspec.open(storage.resolve(path), "rb") as file:
        return int(torch.load(file, weights_only=True)["global_step"])


# ------------------------------------------------------------------------------------------ which there are


def test_by_default_there_is_one_plain_file(tmp_path: Path) -> None:
    fit(tmp_path, LastCheckpoint(str(tmp_path / "run"), every_n_steps=2))
    assert seen(tmp_path / "run") == ["last.ckpt"]
    assert not (tmp_path / "run" / "last.ckpt").is_symlink() and step_in(tmp_path / "run" / "last.ckpt") == 6
    assert not (tmp_path / "run" / LOCK).exists()


def test_the_newest_are_kept(tmp_path: Path) -> None:
    place = tmp_path / "run"
    fit(tmp_path, LastCheckpoint(str(place), every_n_steps=1, keep_last=3), max_steps=5)
    assert seen(place) == ["last.ckpt", *(f"step-0000000{n}.ckpt" for n in (3, 4, 5))]
    assert [step_in(place / f"step-0000000{n}.ckpt") for n in (3, 4, 5)] == [3, 4, 5]
    assert (place / "last.ckpt").samefile(place / "step-00000005.ckpt"), "no second copy of the bytes"
    # a later run goes on from an earlier step, and overwrites nothing: names that are taken get a number
    start = place / "step-00000003.ckpt"
    keep = LastCheckpoint(str(place), every_n_steps=1, keep_last=3)
    fit(tmp_path, keep, start, max_steps=5, limit_val_batches=0)
    assert seen(place) == ["last.ckpt", "step-00000003.ckpt", "step-00000004-1.ckpt", "step-00000005-1.ckpt"]
    assert (place / "last.ckpt").samefile(place / "step-00000005-1.ckpt")
    # with fewer to keep, the rest goes
    fit(tmp_path, LastCheckpoint(str(place)), place / "last.ckpt", max_steps=6)
    assert seen(place) == ["last.ckpt"] and step_in(place / "last.ckpt") == 6


class Scores(Callback):
    """Logs a metric after each validation, whose course is known."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("score", self.values.pop(0))


WITHIN = {"val_check_interval": 1, "check_val_every_n_epoch": None}


@pytest.mark.parametrize("mode, best", [("min", {2: 1.0, 4: 2.0}), ("max", {1: 5.0, 5: 9.0})])
def test_the_best_are_kept(tmp_path: Path, mode: Any, best: dict[int, float]) -> None:
    place = tmp_path / "run"
    keep = LastCheckpoint(str(place), monitor="score", mode=mode, keep_best=2)
    fit(tmp_path, [keep, Scores(5.0, 1.0, float("nan"), 2.0, 9.0, 3.0)], **WITHIN)
    names = [f"step-{n:08d}.ckpt" for n in best]
    assert seen(place) == ["best.ckpt", "last.ckpt", *names]
    first = (min if mode == "min" else max)(best, key=best.__getitem__)
    assert step_in(place / "best.ckpt") == first and step_in(place / "last.ckpt") == 6
    # what was best before an interruption still is
    keep = LastCheckpoint(str(place), monitor="score", mode=mode, keep_best=2)
    fit(tmp_path, [keep, Scores(4.0, 4.0)], place / "last.ckpt", max_steps=8, **WITHIN)
    assert seen(place) == ["best.ckpt", "last.ckpt", *names] and step_in(place / "best.ckpt") == first


def test_a_monitor_that_nothing_logs_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing is logged as 'val/los', its monitor; there are .*val/loss"):
        fit(tmp_path, LastCheckpoint(str(tmp_path / "run"), monitor="val/los"), **WITHIN)


def test_lightnings_own_callback_works_beside_it(tmp_path: Path) -> None:
    place = tmp_path / "run"
    other = ModelCheckpoint(place, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    fit(tmp_path, [LastCheckpoint(str(place), every_n_steps=2, keep_last=2), other], limit_val_batches=0)
    assert seen(place) == ["last.ckpt", "step-00000004.ckpt", "step-00000006.ckpt", "step=3.ckpt", "step=6.ckpt"]
    same(read_checkpoint(place / "step=6.ckpt").state_dict, read_checkpoint(place / "last.ckpt").state_dict)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
        ({"keep_last": 0}, "keep_last is 0"),
        ({"keep_best": 3}, "name it as monitor"),
        ({"monitor": "x", "mode": "best"}, "mode is 'best'"),
        ({"retries": -1}, "retries is -1"),
        ({"max_failures": 0}, "max_failures is 0"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LastCheckpoint("runs/x", **options)


# ------------------------------------------------------------------------------------------ asynchronous


def loaded(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    for state in checkpoint["callbacks"].values():
        state.pop("num_tokens", None)
    return checkpoint


@pytest.mark.parametrize("kind", ["language model", "policy"])
def test_what_is_written_beside_training_is_what_is_written_between_steps(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is held until training has taken further steps, so that anything still shared would have changed."""
    import threading

    from lit_palm.callbacks import last_checkpoint

    def run(name: str, callback: Any) -> None:
        module, data = (
            (language_model(), text_data(tmp_path)) if kind == "language model" else (policy(), prompt_data(tmp_path))
        )
        callbacks = [callback, Release()] if name == "thread" else [callback]
        trainer(tmp_path, callbacks=callbacks, max_steps=5).fit(module, datamodule=data)

    go = threading.Event()
    original = last_checkpoint.write

    def late(job: Any, *args: Any) -> None:
        if job.step == 2:
            assert go.wait(60)
        original(job, *args)

    class Release(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            if trainer.global_step == 3:
                go.set()

    options: dict[str, Any] = {"every_n_steps": 2, "keep_last": 5}
    run("between", LastCheckpoint(str(tmp_path / "between"), **options))
    monkeypatch.setattr(last_checkpoint, "write", late)
    run("thread", LastCheckpoint(str(tmp_path / "thread"), asynchronous=True, **options))
    names = seen(tmp_path / "between")
    assert names == seen(tmp_path / "thread") == [
        "last.ckpt", "step-00000002.ckpt", "step-00000004.ckpt", "step-00000005.ckpt"
    ]  # fmt: skip
    for name in names:
        same(loaded(tmp_path / "between" / name), loaded(tmp_path / "thread" / name), name)


def test_a_run_goes_on_exactly_from_what_was_written_beside_it(tmp_path: Path) -> None:
    straight = everything(fit(tmp_path, LastCheckpoint(str(tmp_path / "whole"))))
    fit(tmp_path, LastCheckpoint(str(tmp_path / "run"), every_n_steps=1, asynchronous=True), max_steps=4)
    again = fit(tmp_path, LastCheckpoint(str(tmp_path / "run"), asynchronous=True), tmp_path / "run" / "last.ckpt")
    same(straight, everything(again))


def test_buffers_are_used_again_and_keep_shared_memory_shared() -> None:
    weight = torch.randn(3, 4)
    tree = {"a": weight, "tied": weight, "rest": [1, {"x": torch.ones(2, dtype=torch.bfloat16)}]}
    buffers = Buffers()
    buffers.reserve({"a": weight})
    first = buffers.copy(tree)
    same(first, tree)
    assert first["a"].data_ptr() == first["tied"].data_ptr() != weight.data_ptr()
    place = first["a"].data_ptr()
    weight += 1
    assert not torch.equal(first["a"], weight)
    assert buffers.copy(tree)["a"].data_ptr() == place
    tree["rest"][1]["x"] = torch.ones(5)  # a collection of another size
    same(buffers.copy(tree), tree)


def test_a_failure_beside_training_is_reported_and_the_end_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lit_palm.callbacks import last_checkpoint

    original = last_checkpoint.write

    def failing(job: Any, *args: Any) -> None:
        if job.step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(job, *args)

    monkeypatch.setattr(last_checkpoint, "write", failing)
    with pytest.warns(UserWarning, match="could not be saved to .*run: .*No space left.*training goes on"):
        fit(tmp_path, LastCheckpoint(str(tmp_path / "run"), every_n_steps=2, asynchronous=True))
    assert step_in(tmp_path / "run" / "last.ckpt") == 6

    def broken(job: Any, *args: Any) -> None:
        raise TypeError("a defect is none of the place's")

    monkeypatch.setattr(last_checkpoint, "write", broken)
    with pytest.raises(TypeError, match="a defect"):
        fit(tmp_path, LastCheckpoint(str(tmp_path / "run"), every_n_steps=2, asynchronous=True))
    assert step_in(tmp_path / "run" / "last.ckpt") == 6


# ------------------------------------------------------------------------------------------ places that fail


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A disk with room for one checkpoint of the tests' network, but not for two."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_leaves_the_checkpoint_before(small_disk: Path, tmp_path: Path) -> None:
    # the folder of a saving that failed is what the next one needs: nothing half is left to take its room
    stopped = pytest.raises(RuntimeError, match=r"2 checkpoints in a row could not be saved to .*disk: .*No space left")
    with stopped, pytest.warns(UserWarning, match=r"could not be saved .*No space left"):
        fit(tmp_path, LastCheckpoint(str(small_disk), every_n_steps=1, max_failures=2))
    assert seen(small_disk) == ["last.ckpt"] and step_in(small_disk / "last.ckpt") == 1
    assert not [name for name in os.listdir(small_disk) if name.startswith(storage.STAGING)]


def test_a_full_disk_does_not_end_a_run_that_can_do_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = [False]
    original = torch.save

    def save(value: Any, file: Any, **options: Any) -> None:
        original(value, file, **options)
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")

    class Filling(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            full[0] = trainer.global_step in (3, 4)

    monkeypatch.setattr(torch, "save", save)
    place = tmp_path / "run"
    with pytest.warns(UserWarning, match="The one before is still there, and training goes on"):
        run = fit(tmp_path, [Filling(), LastCheckpoint(str(place), every_n_steps=2)])
    assert run.global_step == 6 and step_in(place / "last.ckpt") == 6 and len(os.listdir(place)) == 2
    # the last of a run is no detail
    full[0] = True
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="the last checkpoint could not be saved"):
        warnings.simplefilter("ignore")
        fit(tmp_path, LastCheckpoint(str(place)))
    assert step_in(place / "last.ckpt") == 6 and len(os.listdir(place)) == 2


class Flaky(MemoryFileSystem):
    """A store that answers every second writing, or none, with an error that passes."""

    protocol = "flaky"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    asked = 0
    down = False
    torn = False

    def _maybe_fail(self) -> None:
        Flaky.asked += 1
        if Flaky.down or Flaky.asked % 2:
            raise TimeoutError("the server is busy")

    def pipe_file(self, path: str, value: bytes, **options: Any) -> Any:
        self._maybe_fail()
        return super().pipe_file(path, value, **options)

    def put_file(self, local: str, remote: str, **options: Any) -> Any:
        self._maybe_fail()
        return super().put_file(local, remote, **options)

    def cat_file(self, path: str, **options: Any) -> Any:
        if Flaky.down:
            raise TimeoutError("the server is busy")
        return super().cat_file(path, **options)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Any:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.store.clear()
    Flaky.asked, Flaky.down = 0, False
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    return Flaky


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_url_whose_server_is_busy_is_tried_again(asynchronous: bool, flaky: Any, tmp_path: Path) -> None:
    keep = LastCheckpoint("flaky://bucket/run", every_n_steps=2, keep_last=2, asynchronous=asynchronous)
    straight = everything(fit(tmp_path, keep, limit_val_batches=0))
    names = storage.Place("flaky://bucket/run").names()
    assert names == [".checkpoints.json", "last.ckpt", "step-00000004.ckpt", "step-00000006.ckpt"]
    assert step_in("flaky://bucket/run/last.ckpt") == 6
    one, other = (load_network(f"flaky://bucket/run/{name}.ckpt").state_dict() for name in ("last", "step-00000006"))
    same(one, other)
    # and a run resumes from there, through the name that only points
    fit(tmp_path, LastCheckpoint("flaky://bucket/run", every_n_steps=2), max_steps=4)
    keep = LastCheckpoint("flaky://bucket/run")
    again = fit(tmp_path, keep, "flaky://bucket/run/last.ckpt", limit_val_batches=0)
    same(straight, everything(again))
    assert storage.Place("flaky://bucket/run").names() == [".checkpoints.json", "last.ckpt", "step-00000006.ckpt"]


def test_a_url_that_stays_away_is_one_error(flaky: Any, tmp_path: Path) -> None:
    class Down(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            Flaky.down = trainer.global_step >= 3

    stopped = pytest.raises(RuntimeError, match=r"given up after 3 attempts \(TimeoutError: the server is busy\)")
    with stopped, pytest.warns(UserWarning, match=r"could not be saved to flaky://bucket/run: .*after 3 attempts"):
        fit(tmp_path, [Down(), LastCheckpoint("flaky://bucket/run", every_n_steps=2, retries=2)])
    Flaky.down = False
    assert step_in("flaky://bucket/run/last.ckpt") == 2
    Flaky.down = True
    steps: list[int] = []

    class Steps(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            steps.append(trainer.global_step)

    with pytest.raises(ValueError, match=r"written to flaky://bucket/run: .*given up after 1 attempt.*dirpath"):
        fit(tmp_path, [Steps(), LastCheckpoint("flaky://bucket/run", retries=0)])
    assert not steps, "before training starts"


@pytest.mark.parametrize(
    "place, message",
    [("nowhere://bucket/run", "nowhere"), ("file/below", "file"), ("s3://bucket/run", "s3fs|s3://bucket/run")],
)
def test_a_place_that_cannot_be_written_to_is_refused_at_once(place: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    if "://" not in place:
        place = str(tmp_path / place)
    if place.startswith("s3") and _has_s3():
        pytest.skip("here it can be opened")
    with pytest.raises(ValueError, match=f"checkpoints cannot be written to .*({message})"):
        fit(tmp_path, LastCheckpoint(place))


def _has_s3() -> bool:
    try:
        import s3fs  # noqa: F401
    except ImportError:
        return False
    return True


def test_errors_that_pass_and_errors_that_stay() -> None:
    class Http(Exception):
        def __init__(self, code: int) -> None:
            self.code = code

    passing = [TimeoutError(), ConnectionResetError(), OSError("odd"), Http(503), Http(429)]
    assert all(map(storage.is_transient, passing))
    stay = [FileNotFoundError(), PermissionError(), OSError(errno.ENOSPC, "full"), Http(403), ValueError(), KeyError()]
    assert not any(map(storage.is_transient, stay))


# ------------------------------------------------------------------------------------------ two runs


def test_two_runs_in_one_place_are_refused_by_name(tmp_path: Path) -> None:
    place = tmp_path / "run"

    class Second(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            with pytest.raises(ValueError, match=rf"process {os.getpid()} on {socket.gethostname()} has been writing"):
                fit(tmp_path, LastCheckpoint(str(place)))

    fit(tmp_path, [Second(), LastCheckpoint(str(place))], max_steps=1)
    assert seen(place) == ["last.ckpt"]


def lock(place: Path, **changes: Any) -> None:
    place.mkdir(exist_ok=True)
    entry = {"host": socket.gethostname(), "pid": 1, "born": None, "started": "now", "token": "x", "renewed": 0}
    (place / LOCK).write_text(json.dumps({**entry, **changes}))


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    place = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    lock(place, pid=process.pid)
    with pytest.raises(ValueError, match=f"process {process.pid} on "):
        fit(tmp_path, LastCheckpoint(str(place)))
    process.kill()
    fit(tmp_path, LastCheckpoint(str(place)), max_steps=1)  # not even waited for yet
    process.wait()
    # a process that was given the number of a dead one
    lock(place, pid=os.getppid(), born="1")
    fit(tmp_path, LastCheckpoint(str(place)), max_steps=1)
    assert seen(place) == ["last.ckpt"] and not (place / LOCK).exists()


def test_the_lock_of_another_host_counts_while_it_is_renewed(tmp_path: Path) -> None:
    import time

    place = tmp_path / "run"
    lock(place, host="elsewhere", renewed=time.time() - 60)
    with pytest.raises(ValueError, match="process 1 on elsewhere has been writing its checkpoints here since now"):
        fit(tmp_path, LastCheckpoint(str(place)))
    assert json.loads((place / LOCK).read_text())["host"] == "elsewhere", "and is left alone"
    lock(place, host="elsewhere", renewed=time.time() - 3600)
    fit(tmp_path, LastCheckpoint(str(place)), max_steps=1)
    assert seen(place) == ["last.ckpt"]
