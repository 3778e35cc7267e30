"""Ensemble: what it makes of its members' values, how they are logged, and where their networks go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_palm.callbacks import LastCheckpoint
from lit_palm.data import PreferenceData
from lit_palm.models.base import ScalarNetwork
from lit_palm.rollout.rewards import (
    Ensemble,
    PythonReward,
    RegexReward,
    Reward,
    RewardModel,
    every_reward,
    total_reward,
)
from tests.rollout.reward_batches import texts
from tests.support import policy, prompt_data, reward_model, trainer, write_jsonl

ONE, TWO = [1.0, 5.0, -1.0], [3.0, 1.0, -1.0]


def fixed(values: list[float], name: str, weight: float = 1.0) -> Reward:
    return PythonReward(lambda completions: values, weight=weight, name=name)


def combined(combine: Any, *weights: float, k: float = 1.0) -> list[float]:
    members = [fixed(ONE, "one", weights[0]), fixed(TWO, "two", weights[1])]
    total, _ = total_reward([Ensemble(members, combine, k)], texts(["a", "b", "c"]))
    return total.tolist()


def test_mean_minimum_and_lower_bound() -> None:
    assert combined("mean", 1, 1) == [2, 3, -1]
    assert combined("min", 1, 1) == [1, 1, -1]
    # deviations from the mean: 1 and 1; 2 and 2; none
    assert combined("lower_bound", 1, 1) == [1, 1, -1]
    assert combined("lower_bound", 1, 1, k=0.5) == [1.5, 2, -1]
    assert combined("lower_bound", 1, 1, k=0) == combined("mean", 1, 1)


def test_weights_of_members_come_before_and_the_ensembles_own_after() -> None:
    assert combined("mean", 2, 1) == [2.5, 5.5, -1.5]
    assert combined("min", 1, 2) == [1, 2, -2]
    ensemble = Ensemble([fixed(ONE, "one", 2.0), fixed(TWO, "two")], "min", weight=0.5)
    total, values = total_reward([ensemble, fixed([1.0, 1.0, 1.0], "one")], texts(["a", "b", "c"]))
    assert total.tolist() == [2, 1.5, 0]
    assert {name: value.tolist() for name, value in values.items()} == {
        "ensemble": [2, 1, -2], "ensemble/one": ONE, "ensemble/two": TWO, "one": [1, 1, 1],
    }  # fmt: skip


def test_members_are_logged_under_the_ensemble_however_deep() -> None:
    inner = Ensemble([fixed(ONE, "a"), fixed(TWO, "b")], "min", name="inner")
    outer = Ensemble([inner, fixed([0.0, 0.0, 0.0], "c")], name="outer")
    _, values = total_reward([outer], texts(["a", "b", "c"]))
    assert list(values) == outer.logged == ["outer", "outer/inner", "outer/inner/a", "outer/inner/b", "outer/c"]
    assert values["outer/inner"].tolist() == [1, 1, -1] and values["outer"].tolist() == [0.5, 0.5, -0.5]
    assert [reward.name for reward in every_reward([outer])] == ["outer", "inner", "a", "b", "c"]
    assert RegexReward("x").logged == ["regex_reward"]
    batch = texts(["a", "b", "c"])
    assert torch.equal(outer(batch), values["outer"]), "calling it gives the same"


def test_two_names_alike_are_refused_wherever_they_are() -> None:
    ensemble = Ensemble([fixed(ONE, "one"), fixed(TWO, "two")])
    with pytest.raises(ValueError, match="two rewards are called 'ensemble/one': give"):
        total_reward([ensemble, fixed(ONE, "ensemble/one")], texts(["a", "b", "c"]))
    with pytest.raises(ValueError, match="two rewards of an Ensemble are called 'regex_reward'"):
        Ensemble([RegexReward("a"), RegexReward("b")])


def test_a_member_that_misbehaves_is_named_with_its_ensemble() -> None:
    ensemble = Ensemble([fixed(ONE, "good"), fixed([0.0, float("nan"), 0.0], "bad")], name="both")
    with pytest.raises(ValueError, match="reward 'both' raised ValueError: reward 'bad' returned nan for completion 1"):
        total_reward([ensemble], texts(["a", "b", "c"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rewards": []}, "at least two rewards, got 0"),
        ({"rewards": [RegexReward("a")]}, "at least two rewards, got 1: list a single one by itself"),
        ({"k": -1.0}, "k of Ensemble is -1"),
        ({"k": float("nan")}, "k of Ensemble is nan"),
        ({"combine": "median"}, "choose mean, min or lower_bound"),
    ],
)
def test_an_ensemble_that_cannot_be_meant_is_refused(options: dict[str, Any], words: str) -> None:
    members = [RegexReward("a", name="a"), RegexReward("b", name="b")]
    with pytest.raises(ValueError, match=words):
        Ensemble(**{"rewards": members, **options})


class Constant(nn.Module):
    """A reward network that says one number at every token."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.value.expand(tokens.shape)


def test_each_member_gets_its_network_where_the_host_placed_it() -> None:
    inner = Ensemble([RewardModel("3", name="three"), RewardModel("5", name="five")], "min", name="inner")
    ensemble = Ensemble([RegexReward("x"), RewardModel("2"), inner])
    built = ensemble.build(lambda checkpoint, role: Constant(float(checkpoint)))
    assert isinstance(built, nn.ModuleDict) and sum(1 for _ in built.parameters()) == 3
    assert ensemble.network is None
    placed = built.to(torch.float64).requires_grad_(False)  # what a host does before it hands it back
    ensemble.network = placed
    assert ensemble.network is placed and ensemble.rewards[1].network is placed["1"]
    total, values = total_reward([ensemble], texts(["x", "y"]))
    assert values["ensemble/reward_model"].tolist() == [2, 2] and values["ensemble/inner"].tolist() == [3, 3]
    assert total.tolist() == pytest.approx([2, 5 / 3])  # float32
    ensemble.network = None
    assert ensemble.rewards[1].network is None and inner.rewards[0].network is None


def test_members_without_networks_build_none() -> None:
    assert Ensemble([fixed(ONE, "one"), fixed(TWO, "two")]).build(lambda *_: nn.Identity()) is None


def test_a_policy_trains_on_an_ensemble_of_reward_models_and_logs_every_member(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": "a", "chosen": "aaa", "rejected": "b"}, {"prompt": "b", "chosen": "ab", "rejected": "bb"}]
    source = write_jsonl(tmp_path / "pairs.jsonl", rows)
    checkpoints = []
    for seed in (0, 1):
        run = trainer(tmp_path, callbacks=[LastCheckpoint(str(tmp_path / str(seed)))], max_epochs=1)
        run.fit(
            reward_model(), datamodule=PreferenceData(train=source, validation=source, tokenizer="bytes", seed=seed)
        )
        checkpoints.append(str(tmp_path / str(seed) / "last.ckpt"))
    members: list[Reward] = [RewardModel(path, name=f"model_{i}") for i, path in enumerate(checkpoints)]
    module = policy(rewards=[Ensemble([*members, RegexReward("a")], "lower_bound", k=0.5)], value_lr=None)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=prompt_data(tmp_path))
    container = module.frozen["reward/ensemble"]
    networks = [member.network for member in members]
    assert isinstance(container, nn.ModuleDict) and networks == [container["0"], container["1"]]
    assert not any(p.requires_grad for p in container.parameters()) and not any(n.training for n in networks if n)
    logged = {name: value.item() for name, value in run.logged_metrics.items() if "rewards/ensemble" in name}
    parts = ["ensemble", "ensemble/model_0", "ensemble/model_1", "ensemble/regex_reward"]
    assert {f"rewards/{part}/mean" for part in parts} | {f"val/rewards/{part}" for part in parts} <= logged.keys()
    # the value network starts from the first reward model, also inside an ensemble
    assert isinstance(module.networks["value"], ScalarNetwork)
    mean = sum(logged[f"val/rewards/{part}"] for part in parts[1:]) / 3
    assert logged["val/rewards/ensemble"] <= mean + 1e-6, "a lower bound"  # float32
