"""Tiny trainings of one objective: the data files, the modules and the Trainer, in this process or by the command line.

A `Job` is one training; `fit` runs it here, `config` writes it as YAML for `lit-palm fit`. An optimiser step sees the
same rows whether it is made of one batch, of several accumulated ones, or of one on each of several processes.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import string
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from lit_palm.data.demonstrations import DemonstrationData
from lit_palm.data.preferences import PreferenceData
from lit_palm.data.prompts import PromptData
from lit_palm.models.palm import PaLMConfig
from lit_palm.modules.checkpoint import config_from_dict
from lit_palm.modules.language_model import LitLanguageModel
from lit_palm.modules.policy import LitPolicy
from lit_palm.modules.reward_model import LitRewardModel
from lit_palm.rollout.collector import RolloutConfig
from lit_palm.rollout.rewards import PythonReward
from lit_palm.rollout.sampling import Sampling
from lit_palm.testing.batches import DataKind
from lit_palm.testing.entries import class_path, entry_of
from lit_palm.testing.processes import Program
from lit_palm.testing.rows import lower_case, write_rows
from lit_palm.testing.subject import GROUP, Factory, Subject, class_and_arguments

__all__ = ["Job", "Run", "command"]

# Stochastic gradient descent, because Adam blows rounding errors up where a gradient is zero, and clipping far off,
# because a clipped gradient does not tell what it was divided by
SETTINGS = yaml.safe_load("""
trainer: {accelerator: cpu, devices: 1, logger: false, enable_progress_bar: false, enable_model_summary: false,
          num_sanity_val_steps: 0, log_every_n_steps: 1, gradient_clip_val: 100.0}
network: {d_model: 16, num_layers: 1, num_heads: 2, head_dim: 8, max_length: 64}
optimizer: {lr: 0.01, momentum: 0.9}
sampling: {max_new_tokens: 8}
rollout: {num_prompts: 8, passes: 1}
""")
# a fresh network writes any byte: about one in four of these ends a completion
STOP = list(string.ascii_uppercase + string.digits + string.punctuation)
LAUNCHERS = ("SLURM_", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_")
"""Variables that would make another process think that it was started as one of several."""
MODULES: dict[str, type] = {"language_model": LitLanguageModel, "reward": LitRewardModel, "policy": LitPolicy}
ROWS = 4
"""Elements of one optimiser step of offline data."""


@dataclass
class Run:
    """How a training in this process went."""

    trainer: Trainer
    start: dict[str, Tensor]
    """The weights before the first step."""
    metrics: list[dict[str, float]] = field(default_factory=list)
    """Everything logged, one dictionary a batch."""

    @property
    def module(self) -> Any:
        """The LightningModule."""
        return self.trainer.lightning_module

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights and buffers at the end."""
        return copied(self.module.state_dict())

    def everything(self) -> dict[str, Any]:
        """All that decides how the run would go on."""
        return {
            "weights": self.weights,
            "optimizer": self.trainer.optimizers[0].state_dict(),
            "objective": self.module.objective.state_dict(),
            "step": self.trainer.global_step,
        }


class Job:
    """One training of the objective under test.

    Args:
        subject: the test class, with its settings.
        factory: makes the objective.
        folder: for data, cache and checkpoints.
    """

    def __init__(self, subject: Subject, factory: Factory, folder: Path) -> None:
        self.subject, self.factory, self.folder = subject, factory, folder
        made = subject.make(factory)
        self.kind, self.grouped = made.kind, made.grouped
        self.name = type(made).__name__
        self.data: DataKind = subject.data_of(made)
        self.samples = "rollouts" in made.needs
        self.rollout = {**SETTINGS["rollout"], "completions_per_prompt": subject.completions_per_prompt}
        self.rollout.update(subject.rollout)
        self.kept = made.num_kept(self.rollout["num_prompts"], self.rollout["completions_per_prompt"])
        own = {"class_path": class_path(PaLMConfig), "init_args": SETTINGS["network"]}
        self.network: dict[str, Any] = subject.network or own
        self.has_reward = "reward" in made.needs or self.samples

    # ------------------------------------------------------------------ sizes

    def minibatch(self, ways: int) -> int:
        """Rows of a minibatch of a collection, half of which is an optimiser step made of `ways` of them."""
        unit = self.kept // self.rollout["num_prompts"] if self.grouped else 1
        for share in (2, 1):
            if self.kept % (share * ways) == 0 and self.kept // (share * ways) % unit == 0:
                return self.kept // (share * ways)
        raise AssertionError(
            f"{self.name} keeps up to {self.kept} rows a collection here, which cannot be cut into {ways} minibatches "
            f"of whole {'groups' if self.grouped else 'rows'}: set `completions_per_prompt`, or `rollout` "
            "(num_prompts), in the test class so that they can"
        )

    def rollout_fields(self, ways: int, **changes: Any) -> dict[str, Any]:
        """The fields of `RolloutConfig`."""
        return {**self.rollout, "minibatch_size": self.minibatch(ways), **changes}

    def data_fields(self, ways: int) -> dict[str, Any]:
        """The arguments of the data module."""
        source = write_rows(self.data, self.folder / f"{self.data}.jsonl")
        mismatched = {"mismatched": True} if self.data == "unpaired" else {}
        return {
            "train": source, "tokenizer": "bytes", "batch_size": ROWS // ways, "cache_dir": str(self.folder / "cache"),
            **mismatched, **self.subject.data_options,
        }  # fmt: skip

    @property
    def data_class(self) -> type:
        """The data module that reads this kind of data."""
        return {"prompts": PromptData, "demonstrations": DemonstrationData}.get(self.data, PreferenceData)

    # ------------------------------------------------------------------ in this process

    def module(self, ways: int = 1, **rollout: Any) -> Any:
        """A LightningModule that starts from fresh weights."""
        options: dict[str, Any] = dict(self.subject.module_options)
        if self.kind == "policy":
            options["sampling"] = Sampling(**SETTINGS["sampling"], stop=STOP)
            if self.has_reward:
                options["rewards"] = [PythonReward(lower_case)]
            if self.samples:
                options["rollout"] = RolloutConfig(**self.rollout_fields(ways, **rollout))
        return MODULES[self.kind](
            network=config_from_dict(self.network, "network of the test class"),
            objective=self.subject.make(self.factory),
            optimizer=functools.partial(torch.optim.SGD, **SETTINGS["optimizer"]),
            **options,
        )

    def fit(
        self,
        *,
        ways: int = 1,
        epochs: int = 2,
        resume: Path | None = None,
        callbacks: Sequence[Callback] = (),
        **rollout: Any,
    ) -> Run:
        """Train in this process, from fresh weights of a fixed seed.

        Args:
            ways: micro-batches of an optimiser step.
            epochs: times through the data, or collections.
            resume: a checkpoint to go on from.
            callbacks: of Lightning.
            rollout: fields of `RolloutConfig` to set otherwise.
        """
        with quiet():
            module, data = self.module(ways, **rollout), self.data_class(**self.data_fields(ways))
            watch = _Watch()
            trainer = Trainer(
                **SETTINGS["trainer"], max_epochs=epochs, accumulate_grad_batches=ways, callbacks=[watch, *callbacks],
                default_root_dir=self.folder, enable_checkpointing=bool(callbacks),
            )  # fmt: skip
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
        return Run(trainer, watch.start, watch.metrics)

    # ------------------------------------------------------------------ by the command line

    def objective_name(self) -> str:
        """What the objective is called in YAML: the short name of an installed class, else the class path."""
        cls, _ = class_and_arguments(self.factory)
        plugin = entry_of(GROUP, cls)
        return plugin.name if plugin is not None and plugin.health in ("unchecked", "healthy") else class_path(cls)

    def config(self, processes: int, epochs: int = 2) -> dict[str, Any]:
        """The configuration of `lit-palm fit` for the same training, on several processes."""
        _, arguments = class_and_arguments(self.factory)
        options: dict[str, Any] = dict(self.subject.module_options)
        if self.kind == "policy":
            options["sampling"] = {**SETTINGS["sampling"], "stop": STOP}
            if self.has_reward:
                function = f"{lower_case.__module__}.{lower_case.__name__}"
                options["rewards"] = [{"class_path": "PythonReward", "init_args": {"function": function}}]
            if self.samples:  # sizes of a collection count over all processes
                options["rollout"] = self.rollout_fields(1)
        module = MODULES[self.kind]
        last = {"class_path": "lit_palm.callbacks.LastCheckpoint", "init_args": {"dirpath": str(self.folder / "cli")}}
        return {
            "seed_everything": 0,
            "trainer": {
                **SETTINGS["trainer"], "max_epochs": epochs, "devices": processes, "callbacks": [last],
                "default_root_dir": str(self.folder), **({"strategy": "ddp"} if processes > 1 else {}),
            },
            "model": {
                "class_path": f"{module.__module__}.{module.__name__}",
                "init_args": {
                    "network": self.network,
                    "objective": {"class_path": self.objective_name(), "init_args": arguments},
                    "optimizer": {"class_path": "torch.optim.SGD", "init_args": SETTINGS["optimizer"]},
                    **options,
                },
            },
            "data": {
                "class_path": f"{self.data_class.__module__}.{self.data_class.__name__}",
                "init_args": self.data_fields(processes),
            },
        }  # fmt: skip

    def write_config(self, processes: int) -> Path:
        """`config` as a file."""
        path = self.folder / f"on-{processes}.yaml"
        path.write_text(yaml.safe_dump(self.config(processes), sort_keys=False), encoding="utf-8")
        return path


class _Watch(Callback):
    """Keeps the weights at the start, and what each batch logged."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.metrics: list[dict[str, float]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.start = copied(pl_module.state_dict())

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of weights."""
    return {name: value.detach().clone() for name, value in state.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """A seed of its own, one thread, and nothing of Lightning's advice; all as it was afterwards."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")]
    levels, threads = [logger.level for logger in loggers], torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        torch.set_num_threads(1)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def command(arguments: Sequence[str], cls: type, ranks: int = 1, timeout: float = 300) -> str:
    """What `python -m lit_palm` prints, as another process that can import what this one can.

    Args:
        arguments: the command line.
        cls: a class that it must be able to import; its module's folder joins the path.
        ranks: how many processes run it, started as by `torchrun`.
        timeout: seconds.

    Raises:
        AssertionError: it fails; with the end of what it said.
    """
    module = sys.modules[cls.__module__]
    home = Path(module.__file__ or ".").resolve().parents[cls.__module__.count(".")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
    environment["PYTHONPATH"] = os.pathsep.join([str(home), *(p for p in sys.path if p)])
    environment["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as output:
        done = Program("lit_palm", arguments, Path(output), environment, ranks=ranks).finish(timeout)
    err = done.stderr
    if done.returncode == -signal.SIGKILL:
        err += f"\nstopped after {timeout:g} seconds: do all processes run the same number of forward passes?"
    assert done.returncode == 0, f"lit-palm {' '.join(arguments)} failed:\n{err[-3000:] or done.stdout[-3000:]}"
    return done.stdout
