"""Run by test_distributed.py and test_strategies.py as a program: trainings on several processes under a strategy.

The strategy is one of `tests.modules.strategies`; `sharded` is ModelParallelStrategy (FSDP2).

    python -m tests.modules.two_processes OUTPUT_FOLDER STRATEGY JOB...

Each job leaves OUTPUT_FOLDER/JOB.pt with the weights it ended with and what `Trajectory` saw. A job is a kind and
settings, as KIND+SETTING+SETTING (see `SETTINGS`): KIND+resumed is interrupted and resumed; KIND+20 makes so many steps
and leaves OUTPUT_FOLDER/JOB/last.ckpt. A kind with a dot is the class of an objective, as lit_palm_dpo.DPO.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.attention import flex_attention as torchs

from lit_palm.callbacks import LastCheckpoint
from lit_palm.data import PreferenceData
from lit_palm.models import compiled, flex
from lit_palm.modules.reference import ReferenceUpdate
from lit_palm.modules.sharding import Sharding
from lit_palm.rollout import lengths
from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.testing.rows import write_rows
from tests.modules.strategies import PROCESSES, ROW_GROUPS, Memory, Trajectory, strategy
from tests.support import (
    config,
    language_model,
    policy,
    preference_policy,
    prompt_data,
    ranking_data,
    reward_model,
    selective_policy,
    text_data,
    trainer,
    weights,
)

SETTINGS: dict[str, dict[str, Any]] = {
    "layers": {"sharding": Sharding(gather="layers")},
    "whole": {"sharding": Sharding(frozen="whole")},
    "offloaded": {"sharding": Sharding(frozen="offloaded")},
    "offload": {"sharding": Sharding(offload=True)},
    "hybrid": {"sharding": Sharding(shard_size=2)},
    "continuous": {"engine": ContinuousEngine(max_batch_size=3)},
    "recomputed": {"network": {"activation_checkpointing": True}},
    "unfrozen": {"unfrozen_layers": 1},
    "compiled": {"compile": True},
    "traced": {"compile": True},
    "flex": {"network": {"attention": "flex"}},
    "deep": {"network": {"num_layers": 3}},
    "large": {"network": {"d_model": 512, "num_layers": 8, "num_heads": 8, "head_dim": 64}},
    "bf16": {},
    "measured": {},
    "resumed": {},
}
"""What a setting changes in the module; `bf16` is one of the Trainer, `measured` leaves what `Memory` saw."""


def make(job: str, folder: Path, ways: int, **options: Any) -> tuple[Any, Any]:
    """Module and data of a job whose optimiser step is `ways` micro-batches (on as many ranks, or accumulated)."""
    if job == "language_model":
        return language_model(**options), text_data(folder, batch_size=4 // ways)
    if job == "reward_model":
        return reward_model(calibrate="whiten", **options), ranking_data(folder, batch_size=4 // ways)
    if job == "selection":  # a minibatch may be smaller than others, and hold nothing for one of two ranks
        return selective_policy(**options), prompt_data(folder)
    if job == "preference":
        return preference_policy(**options), ranking_data(folder, batch_size=4 // ways)
    if job == "moving_reference":
        update = ReferenceUpdate(mix=0.3, every=2)
        return preference_policy(reference_update=update, **options), ranking_data(folder, batch_size=4 // ways)
    if job == "known_reference":
        return preference_policy(precompute_reference=True, **options), ranking_data(folder, batch_size=4 // ways)
    if "." in job:
        module, _, name = job.rpartition(".")
        return with_objective(getattr(import_module(module), name)(), folder, ways, **options)
    # with a bound on the divergence most of a collection's minibatches are left unused
    return policy(ppo={"max_update_kl": 2e-3} if job == "early_stop" else {}, **options), prompt_data(folder)


def with_objective(objective: Any, folder: Path, ways: int, **options: Any) -> tuple[Any, Any]:
    """A policy with an objective, on the data that it is for."""
    if type(objective).__name__ == "KTO":  # feedback on single answers
        source = write_rows("unpaired", folder / "unpaired.jsonl")
        fields: dict[str, Any] = {"tokenizer": "bytes", "batch_size": 4 // ways, "mismatched": True}
        return preference_policy(objective=objective, **options), PreferenceData(train=source, **fields)
    if "rollouts" not in objective.needs:
        return preference_policy(objective=objective, **options), ranking_data(folder, batch_size=4 // ways)
    kept = objective.num_kept(4, 4)
    sizes = {"num_prompts": 4, "completions_per_prompt": 4, "minibatch_size": kept // 2, "max_rounds": 2}
    value_lr = 5e-3 if "value" in objective.needs else None
    return policy(rollout=sizes, objective=objective, value_lr=value_lr, **options), prompt_data(folder)


def settings_of(job: str) -> tuple[str, list[str], dict[str, Any]]:
    """Kind, settings, and the module's options of a job."""
    kind, *settings = job.split("+")
    options: dict[str, Any] = {}
    network: dict[str, Any] = {}
    for setting in settings:
        if not setting.isdigit():
            network |= SETTINGS[setting].get("network", {})
            options |= {k: v for k, v in SETTINGS[setting].items() if k != "network"}
    return kind, settings, {**options, **({"network": config(**network)} if network else {})}


def train(job: str, folder: Path, name: str = "one") -> tuple[Any, Any, Trajectory]:
    """Run a job under the strategy of a name; the Trainer, the module and what was seen."""
    kind, settings, options = settings_of(job)
    steps = next((int(s) for s in settings if s.isdigit()), None)
    for setting, backend in (("traced", "eager"), ("compiled", "aot_eager")):
        if setting in settings:
            compiled.BACKEND = backend  # graphs as ever (and their derivatives), without minutes in a C++ compiler
    if "flex" in settings:  # torch runs it on the host without a kernel, once it no longer refuses to train by it
        torchs._validate_device, flex.BACKEND, flex.BLOCK = lambda *tensors: None, "eager", 8
    seen = Trajectory()
    callbacks: list[Any] = [seen]
    if steps is not None:
        callbacks.append(LastCheckpoint(str(folder / job)))
    if "measured" in settings:
        callbacks.append(Memory(folder / job))

    def run(**changes: Any) -> Any:
        lengths: dict[str, Any] = {"max_epochs": 2} if steps is None else {"max_epochs": -1, "max_steps": steps}
        if "bf16" in settings:
            lengths["precision"] = "bf16-mixed"
        fixed = {"strategy": strategy(name), "devices": PROCESSES[name], "gradient_clip_val": 0.3}
        return trainer(folder, **{**fixed, **lengths, "callbacks": callbacks, **changes})

    path = None
    if "resumed" in settings:  # after three steps, in the middle of an epoch
        module, data = make(kind, folder, ROW_GROUPS[name], **options)
        last = LastCheckpoint(str(folder / job))
        run(callbacks=[last], max_epochs=None, max_steps=3).fit(module, datamodule=data)
        path = str(folder / job / "last.ckpt")
    module, data = make(kind, folder, ROW_GROUPS[name], **options)
    second = run(enable_checkpointing=steps is not None)
    second.fit(module, datamodule=data, ckpt_path=path)
    return second, module, seen


def main(folder: Path, name: str, jobs: list[str]) -> None:
    for job in jobs:
        run, module, seen = train(job, folder, name)
        state = {}
        if name in ("ddp", "sharded"):  # of others the checkpoint tells
            state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in weights(module).items()}
        if run.is_global_zero:
            metrics = {k: float(v) for k, v in run.callback_metrics.items()}
            found = {"weights": state, "step": run.global_step, "metrics": metrics}
            torch.save({**found, "losses": seen.losses, "norms": seen.norms}, folder / f"{job}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    lengths.ON_THE_HOST = 0  # rows are cut wherever that saves a token; one process leaves them together
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
