"""Training the topmost blocks alone: what moves and what does not, in every module, and what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_palm.models.lora import LoRA
from lit_palm.modules import LitLanguageModel, LitPolicy, LitRewardModel
from lit_palm.objectives import PPO
from lit_palm.rollout.collector import RolloutConfig
from lit_palm.rollout.rewards import PythonReward
from lit_palm.rollout.sampling import Sampling
from tests.modules.strategies import saved_weights
from tests.modules.test_strategies import processes
from tests.modules.two_processes import train
from tests.support import adamw, apart, config, demonstration_data, everything, lower_case, prompt_data, ranking_data
from tests.support import trainer as make_trainer


def module(kind: str, unfrozen: int | None) -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {"network": config(num_layers=3), "optimizer": adamw, "unfrozen_layers": unfrozen}
    if kind == "language_model":
        return LitLanguageModel(**options)
    if kind == "reward_model":
        return LitRewardModel(**options)
    rollout = RolloutConfig(num_prompts=4, minibatch_size=2)
    rewards = [PythonReward(lower_case)]
    return LitPolicy(objective=PPO(), rewards=rewards, rollout=rollout, sampling=Sampling(max_new_tokens=8), **options)


DATA: dict[str, Any] = {
    "language_model": demonstration_data, "reward_model": ranking_data, "policy": prompt_data
}  # fmt: skip


@pytest.mark.parametrize("kind", DATA)
def test_nothing_below_the_topmost_blocks_moves(kind: str, tmp_path: Path) -> None:
    """Weight decay and momentum included; heads, the final norm and the topmost block do move."""
    made, data = module(kind, 1), DATA[kind](tmp_path)
    start: dict[str, Tensor] = {}
    original = made.on_train_start
    made.on_train_start = lambda: (start.update({k: v.clone() for k, v in made.state_dict().items()}), original())
    run = make_trainer(tmp_path, max_epochs=2)
    run.fit(made, datamodule=data)
    end = made.state_dict()
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    trained = {name for name in start if ".embedding." not in name and not {".layers.0.", ".layers.1."} & parts(name)}
    assert moved | {n for n in trained if n.endswith(("offset", "scale"))} == trained
    assert any(".layers.2." in name for name in moved)
    if kind != "language_model":
        assert any("head.weight" in name for name in moved)
    optimizer = run.optimizers[0]
    size = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert size < 0.4 * sum(p.numel() for p in made.parameters()), "the optimiser holds what is trained alone"


def parts(name: str) -> set[str]:
    return {f".layers.{i}." for i in range(3) if f".layers.{i}." in name}


def test_all_blocks_are_all_but_the_embedding(tmp_path: Path) -> None:
    made = module("language_model", 3)
    make_trainer(tmp_path, max_epochs=1).fit(made, datamodule=demonstration_data(tmp_path))
    assert {name for name, p in made.named_parameters() if not p.requires_grad} == {"networks.policy.embedding.weight"}


@pytest.mark.parametrize("kind", ["language_model", "policy"])
def test_accumulation_takes_the_same_steps(kind: str, tmp_path: Path) -> None:
    def fit(**options: Any) -> dict[str, Tensor]:
        run = make_trainer(tmp_path, max_epochs=2, **options)
        size = 4 // options.get("accumulate_grad_batches", 1)
        made = module(kind, 1)
        if kind == "policy":
            made.rollout.minibatch_size = size
            run.fit(made, datamodule=prompt_data(tmp_path))
        else:
            run.fit(made, datamodule=demonstration_data(tmp_path, batch_size=size))
        weights: dict[str, Tensor] = everything(run)["weights"]
        return weights

    # Adam turns rounding of float32 into parts of a step where a gradient is near zero
    assert apart(fit(), fit(accumulate_grad_batches=2)) < 1e-4


@pytest.mark.parametrize("strategy", ["sharded", "fsdp1"])
def test_spread_over_two_processes_it_takes_the_same_steps(strategy: str, tmp_path: Path) -> None:
    """Half of every weight on each, frozen ones too."""
    job = "preference+deep+unfrozen+3"
    two = processes(tmp_path, strategy, job, timeout=300)
    _, _, one = train(job, tmp_path / "one")
    assert torch.load(two / f"{job}.pt")["losses"] == pytest.approx(one.losses, rel=1e-5, abs=1e-5)
    ours, theirs = (saved_weights(folder / job / "last.ckpt") for folder in (tmp_path / "one", two))
    assert apart(ours, theirs) < 2e-4


def test_too_many_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.unfrozen_layers is 4: choose from 0 to the network's 3 blocks"):
        make_trainer(tmp_path, max_epochs=1).fit(module("language_model", 4), datamodule=demonstration_data(tmp_path))


def test_adapters_freeze_all_blocks_already() -> None:
    with pytest.raises(ValueError, match=r"model.lora trains adapters .* leave model.unfrozen_layers out"):
        LitLanguageModel(config(), lora=LoRA(), unfrozen_layers=1)
