"""Run by test_kills.py as a program: a PPO run by the command line that is killed with SIGKILL again and again.

    python -m tests.modules.killed_runs FOLDER file|folder COUNT synchronous|asynchronous SEED

`file` is one process, `folder` two that share the weights (FSDP2). The processes are forked, so that what takes seconds
is imported once; each then calls what `lit-palm` calls. A kill hits all processes of the run at once, in a phase and at
a distance that chance chooses. After each every published name must load; the run goes on from `last.ckpt`, and its end
must be that of a run that was never killed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_palm.callbacks import LastCheckpoint
from lit_palm.cli import main
from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.modules.layouts import load_shards
from tests.support import same, sentence, write_jsonl

PHASES = ["start", "collection", "update", "save"]
TARGETS = PHASES[1:]
STEPS_A_KILL = 12
"""By how much the run must be longer for each kill, so that it is not over before the last."""


class Phases(Callback):
    """Writes what the run is doing into a file: phase, whether a thread writes a checkpoint, steps since the start.

    What was written before a SIGKILL stays, as the system has it.
    """

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.steps = 0

    def put(self, place: int, value: int) -> None:
        os.pwrite(self.file, bytes([value]), place)

    def during(self, owner: Any, name: str, place: int, value: int) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            before = os.pread(self.file, 1, place)[0]
            self.put(place, value)
            try:
                return original(*args, **options)
            finally:
                self.put(place, before)

        setattr(owner, name, call)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self.put(0, PHASES.index("update"))
        self.during(pl_module.rollouts.loader, "collect", 0, PHASES.index("collection"))
        last = next(c for c in trainer.callbacks if isinstance(c, LastCheckpoint))
        self.during(last, "_save", 0, PHASES.index("save"))
        self.during(last, "_run", 1, 1)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.is_global_zero:
            self.steps = min(self.steps + 1, 255)
            self.put(2, self.steps)


def write_config(folder: Path, kind: str, steps: int, asynchronous: bool) -> Path:
    """PPO with all that it can carry from step to step: adaptive KL, running moments, two passes, a value network."""
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": sentence(i)[: 1 + i % 9]} for i in range(10)])
    saving = {"dirpath": str(folder / "run"), "every_n_steps": 2, "keep_last": 2, "asynchronous": asynchronous}
    trainer: dict[str, Any] = {
        "max_steps": steps, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "gradient_clip_val": 0.5, "log_every_n_steps": 1,
        "default_root_dir": str(folder),
        "callbacks": [
            {"class_path": "LastCheckpoint", "init_args": saving},
            {"class_path": f"{Phases.__module__}.Phases", "init_args": {"path": str(folder / "phase")}},
        ],
    }  # fmt: skip
    if kind == "folder":
        path = f"{ModelParallelStrategy.__module__}.ModelParallelStrategy"
        sizes = {"data_parallel_size": 2, "tensor_parallel_size": 1}
        trainer |= {"devices": 2, "strategy": {"class_path": path, "init_args": sizes}}
    network = {"d_model": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "max_length": 64}
    objective = {"kl_target": 0.5, "kl_horizon": 20, "kl_coef": 0.1, "scale_reward": "running", "center_reward": True}
    rewards = [{"class_path": "PythonReward", "init_args": {"function": "tests.support.lower_case"}}]
    model = {
        "network": {"class_path": "PaLMConfig", "init_args": network},
        "objective": {"class_path": "PPO", "init_args": {**objective, "missing_eos_penalty": 0.5}},
        "rewards": rewards,
        "rollout": {"num_prompts": 8, "passes": 2, "minibatch_size": 4},
        "sampling": {"max_new_tokens": 8},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        "value_lr": 0.005,
    }
    config = {
        "seed_everything": 0,
        "trainer": trainer,
        "model": {"class_path": "LitPolicy", "init_args": model},
        "data": {"class_path": "PromptData", "init_args": {"train": prompts, "tokenizer": "bytes", "batch_size": 4}},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def command_line(folder: Path) -> int:
    """What `lit-palm fit` does, from the newest checkpoint if there is one."""
    arguments = ["fit", "--config", str(folder / "run.yaml")]
    newest = folder / "run" / "last.ckpt"
    return main([*arguments, f"--ckpt_path={newest}"] if os.path.lexists(newest) else arguments)


def start(folder: Path, ranks: int) -> int:
    """Start the run in a process group of its own; the number of the group, which is that of its first rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "phase").write_bytes(bytes(3))
    child = os.fork()
    if child:
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(child, child)
        return child
    status = 1
    try:
        os.setpgid(0, 0)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        other = 0
        if ranks == 2:  # as torchrun starts them
            other = os.fork()
            rank = "0" if other else "1"
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2", NODE_RANK="0",
                              RANK=rank, LOCAL_RANK=rank)  # fmt: skip
        status = command_line(folder)
        if other:
            status = status or os.waitstatus_to_exitcode(os.waitpid(other, 0)[1])
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def end_of(folder: Path) -> dict[str, Any]:
    """Weights, optimiser and the objective's state of the newest checkpoint."""
    path = (folder / "run" / "last.ckpt").resolve()
    if path.is_dir():
        shards = load_shards(str(path), ("state_dict", "optimizer_0"))
        loaded = {**torch.load(path / "meta.pt", weights_only=True), **shards}
    else:
        loaded = torch.load(path, weights_only=True)
    optimizer = {k: v for k, v in loaded.items() if k.startswith("optimizer")}
    assert optimizer and loaded["state_dict"]
    return {"weights": loaded["state_dict"], **optimizer, "objective": loaded["lit_palm"]["objective"],
            "step": loaded["global_step"]}  # fmt: skip


def finish(folder: Path, ranks: int) -> dict[str, Any]:
    """To the end, undisturbed."""
    child = start(folder, ranks)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"status {status}: {(folder / 'log').read_text()[-3000:]}"
    return end_of(folder)


def check(folder: Path) -> int:
    """Every published name loads; the step of the newest."""
    names = [p.name for p in (folder / "run").iterdir() if not p.name.startswith(".")]
    assert "last.ckpt" in names
    for name in names:
        assert read_checkpoint(folder / "run" / name).state_dict, name
    return int(end_of(folder)["step"])


def kill_once(folder: Path, ranks: int, chance: random.Random) -> str:
    """Start, wait for a checkpoint, some steps and a phase, and kill; where it fell."""
    child = start(folder, ranks)
    steps, target, late = chance.randint(1, 5), PHASES.index(chance.choice(TARGETS)), chance.random() * 0.01
    deadline = time.monotonic() + 120

    def marks() -> bytes:
        return (folder / "phase").read_bytes()

    try:
        while marks()[2] < steps or marks()[0] != target or not os.path.lexists(folder / "run" / "last.ckpt"):
            assert os.waitpid(child, os.WNOHANG) == (0, 0), f"ended by itself: {(folder / 'log').read_text()[-3000:]}"
            assert time.monotonic() < deadline, "it does not get there"
            time.sleep(0.0005)
        time.sleep(late)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    phase, writing, _ = marks()
    return PHASES[phase] + (" while a thread saves" if writing and PHASES[phase] != "save" else "")


def prove(folder: Path, kind: str, count: int, asynchronous: bool, seed: int) -> None:
    ranks, begun = 2 if kind == "folder" else 1, time.monotonic()
    write_config(folder, kind, 10 + STEPS_A_KILL * count, asynchronous)
    expected = finish(folder, ranks)
    shutil.rmtree(folder / "run")
    chance, reached, fell = random.Random(seed), 0, Counter[str]()
    for _ in range(count):
        fell[kill_once(folder, ranks, chance)] += 1
        step = check(folder)
        assert step >= reached, f"step {reached} was published, and {step} is the newest now"
        reached = step
    same(expected, finish(folder, ranks))
    places = ", ".join(f"{number} in {place}" for place, number in sorted(fell.items()))
    print(f"killed {count} times, up to step {reached} of {expected['step']}: {places}; "
          f"{time.monotonic() - begun:.0f} s")  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    prove(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4] == "asynchronous", int(sys.argv[5]))
