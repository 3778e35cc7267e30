"""LitPolicy: PPO and offline objectives, its frozen networks, its validation, and rewards that misbehave."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_palm.data import DemonstrationData
from lit_palm.models.base import ScalarNetwork
from lit_palm.modules import LitPolicy
from lit_palm.modules.language_model import language_model_output
from lit_palm.modules.reward_model import last_scores
from lit_palm.modules.weights import load_network
from lit_palm.objectives import Objective
from lit_palm.rollout.rewards import PythonReward, Reward, RewardModel
from lit_palm.rollout.sampling import Sampling
from lit_palm.types import Experience, Loss, Output
from tests.support import (
    Preference,
    config,
    lower_case,
    policy,
    preference_policy,
    prompt_data,
    recorded,
    trainer,
    weights,
    write_jsonl,
)


def letters(completions: list[str]) -> list[float]:
    return [float(sum(c.islower() for c in text)) for text in completions]


def test_ppo_raises_a_verifiable_reward(tmp_path: Path) -> None:
    """Lower-case letters in eight tokens: a fresh network writes any byte, so it starts below one."""
    module = policy(
        network=config(d_model=32),
        ppo={"kl_target": None, "kl_coef": 0.0, "scale_reward": "running", "missing_eos_penalty": 0.0},
        rollout={"num_prompts": 64, "minibatch_size": 32, "passes": 2},
        rewards=[PythonReward(letters)],
        sampling=Sampling(max_new_tokens=8),
        optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3),
        value_lr=None,
    )
    data = prompt_data(tmp_path)
    run = trainer(tmp_path, max_epochs=25, check_val_every_n_epoch=25, gradient_clip_val=1.0)
    start = run.validate(module, datamodule=data, verbose=False)[0]["val/reward"]
    run.fit(module, datamodule=data)
    assert start < 2
    assert run.callback_metrics["val/reward"].item() > start + 3


# ------------------------------------------------------------------------------------------ offline objectives


class WeightedImitation(Objective):
    """Cross-entropy of given completions, pulled towards the reference: an offline objective as a plugin would be."""

    needs: ClassVar = frozenset({"reference"})

    def __init__(self, pull: float = 0.0) -> None:
        self.pull = pull

    def weight(self, experience: Experience) -> Tensor:
        return experience["loss_mask"].sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        mask = experience["loss_mask"]
        apart = torch.where(mask, output.logps - output.ref_logps, 0)
        total = -torch.where(mask, output.logps, 0).sum() + self.pull * apart.square().sum()
        return Loss(total, {"apart": (apart.detach().abs().sum(), mask.sum())})


def test_an_offline_objective_learns_from_given_data(tmp_path: Path) -> None:
    rows = [{"prompt": "say ", "completion": "yes"}, {"prompt": "do ", "completion": "no"}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)

    def trained(pull: float) -> dict[str, float]:
        torch.manual_seed(0)
        module = LitPolicy(config(), WeightedImitation(pull), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
        run = trainer(tmp_path, max_epochs=30)
        run.fit(module, datamodule=DemonstrationData(train=path, validation=path, tokenizer="bytes", batch_size=2))
        assert set(module.networks) == {"policy"}, "nothing asked for a value network"
        return {k: float(v) for k, v in run.callback_metrics.items()}

    free, held = trained(0.0), trained(10.0)
    assert free["val/loss"] < 1.0  # from 5.6
    assert free["val/apart"] > 3 > 0.5 > held["val/apart"], "the reference is the policy as it started"


def test_data_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="WeightedImitation learns from given completions, not from prompts"):
        trainer(tmp_path, max_epochs=1).fit(LitPolicy(config(), WeightedImitation()), datamodule=prompt_data(tmp_path))
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "say ", "completion": "yes"}])
    data = DemonstrationData(train=path, tokenizer="bytes", batch_size=1)
    with pytest.raises(ValueError, match=r"PPO samples its own completions.*PromptData"):
        trainer(tmp_path, max_epochs=1).fit(policy(), datamodule=data)


def test_validation_takes_the_log_probabilities_of_an_engine_that_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, data = policy(), prompt_data(tmp_path)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=data)
    assert module.engine_agrees is True
    asked: list[int] = []
    original = module.policy_logps
    monkeypatch.setattr(module, "policy_logps", lambda rows: asked.append(1) or original(rows))
    quick = run.validate(module, datamodule=data, verbose=False)[0]
    assert not asked
    module.engine_agrees = False
    slow = run.validate(module, datamodule=data, verbose=False)[0]
    assert asked
    # sums over completions of up to 8 tokens, each within 1e-5
    assert quick.pop("val/kl") == pytest.approx(slow.pop("val/kl"), abs=8e-5) and quick == slow


# ------------------------------------------------------------------------------------------ frozen networks


def test_the_reference_does_not_move_and_is_not_saved(tmp_path: Path) -> None:
    module = policy()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=prompt_data(tmp_path))
    reference = module.frozen["reference"]
    before = copy.deepcopy(reference.state_dict())
    first = weights(module)
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=prompt_data(tmp_path))
    assert all(torch.equal(v, before[k]) for k, v in reference.state_dict().items())
    # with tied embeddings too: the policy's own did move
    name = "networks.policy.embedding.weight"
    assert not torch.equal(first[name], weights(module)[name])
    theirs = {p.data_ptr() for p in reference.parameters()}
    assert not theirs & {p.data_ptr() for p in module.parameters()}
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training
    run.save_checkpoint(tmp_path / "x.ckpt")
    saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert {k.split(".")[1] for k in saved} == {"policy", "value"}


def test_the_value_network_starts_with_the_reward_models_scores(stages: dict[str, Path], tmp_path: Path) -> None:
    source = str(stages["reward_model"])
    module = policy(network=str(stages["language_model"]), rewards=[RewardModel(source)])
    trainer(tmp_path).validate(module, datamodule=prompt_data(tmp_path, tokenizer=None), verbose=False)
    reward, value = load_network(source, "reward"), module.networks["value"]
    assert isinstance(value, ScalarNetwork)
    tokens = torch.tensor([[258, 97, 98, 99, 32, 100], [258, 120, 121, 257, 256, 256]])
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    assert torch.equal(last_scores(value.eval(), tokens, mask), last_scores(reward.eval(), tokens, mask))
    assert value.scale != 1, "calibrated"
    # what was trained is not what scores
    assert value.head.weight.data_ptr() != module.rewards[0].network.head.weight.data_ptr()  # type: ignore[union-attr]


def test_the_value_network_may_come_from_elsewhere(stages: dict[str, Path], tmp_path: Path) -> None:
    module = policy(network=str(stages["language_model"]), value=str(stages["policy"]))
    trainer(tmp_path).validate(module, datamodule=prompt_data(tmp_path, tokenizer=None), verbose=False)
    there = load_network(stages["policy"], "value").state_dict()
    assert all(torch.equal(v, there[k]) for k, v in module.networks["value"].state_dict().items())


# ------------------------------------------------------------------------------------------ validation


def test_validation_is_the_same_whenever_and_however_batched(tmp_path: Path) -> None:
    def validated(module: Any, **options: Any) -> tuple[dict[str, float], list[Any]]:
        found = trainer(tmp_path).validate(module, datamodule=prompt_data(tmp_path, **options), verbose=False)[0]
        return dict(found), [s["completion"] for s in module.samples]

    module = policy()
    first, samples = validated(module)
    torch.manual_seed(5)
    again, same_samples = validated(module, seed=3)
    assert first == again and samples == same_samples
    single, _ = validated(module, eval_batch_size=1)
    # sums of float32 log-probabilities over batches of another shape
    assert single == pytest.approx(first, rel=1e-5, abs=1e-5)
    assert {"val/reward", "val/kl", "val/length", "val/ended", "val/rewards/lower_case"} <= set(first)
    assert first["val/reward"] == pytest.approx(first["val/rewards/lower_case"] + 0.5 * first["val/rewards/count_a"])
    other, _ = validated(policy(rollout={"seed": 1}))
    assert other["val/reward"] != first["val/reward"], "another seed draws other completions"


def test_training_does_not_move_validations_seeds(tmp_path: Path) -> None:
    """A learning rate of nothing: whatever was collected in between, validation finds the same."""
    module = policy(optimizer=lambda params: torch.optim.SGD(params, lr=0.0), value_lr=None)
    checkpoint = ModelCheckpoint(tmp_path / "best", monitor="val/reward", mode="max", save_top_k=-1)
    found: list[float] = []
    original = module.on_validation_epoch_end

    def end() -> None:
        original()
        found.append(float(module.trainer.callback_metrics["val/reward"]))

    module.on_validation_epoch_end = end  # type: ignore[method-assign]
    run = trainer(tmp_path, max_epochs=3, callbacks=[checkpoint])
    run.fit(module, datamodule=prompt_data(tmp_path))
    assert len(found) == 3 and len(set(found)) == 1
    assert checkpoint.best_model_score is not None and float(checkpoint.best_model_score) == found[0]
    assert Path(checkpoint.best_model_path).exists()


def test_a_checkpoint_is_validated_by_its_path(tmp_path: Path) -> None:
    """Against the reference that training had: the network that both are built from."""
    run = trainer(tmp_path, max_epochs=1)
    module = policy()
    run.fit(module, datamodule=prompt_data(tmp_path))
    run.save_checkpoint(tmp_path / "x.ckpt")
    trained = trainer(tmp_path).validate(module, datamodule=prompt_data(tmp_path), verbose=False)
    fresh = trainer(tmp_path).validate(policy(), datamodule=prompt_data(tmp_path), verbose=False)
    loaded = trainer(tmp_path).validate(
        policy(), datamodule=prompt_data(tmp_path), ckpt_path=tmp_path / "x.ckpt", verbose=False
    )
    assert loaded == trained and loaded != fresh
    assert fresh[0]["val/kl"] == pytest.approx(0, abs=1e-5) != loaded[0]["val/kl"]


def test_prediction_gives_rows_with_their_rewards(tmp_path: Path) -> None:
    module, data = policy(), prompt_data(tmp_path, predict=str(tmp_path / "held_prompts.jsonl"))
    batches: Any = trainer(tmp_path).predict(module, datamodule=data)
    rows = [row for batch in batches for row in batch]
    assert len(rows) == 6
    for row in rows:
        assert row["rewards"]["lower_case"] == pytest.approx(lower_case([row["completion"]])[0], abs=1e-6)
        assert row["reward"] == pytest.approx(row["rewards"]["lower_case"] + 0.5 * row["rewards"]["count_a"], abs=1e-6)
        assert abs(row["kl"]) < 1e-5, "it is its own reference"


def test_collections_go_through_all_prompts_in_turn(tmp_path: Path) -> None:
    # ten prompts, eight a collection: after five collections each was used four times
    module = policy(rollout={"passes": 1})
    seen: list[str] = []
    reward = module.rewards[0]
    original = reward.__class__.__call__

    class Spy(PythonReward):
        def __call__(self, batch: Any) -> Any:
            seen.extend(batch.prompts)
            return original(self, batch)

    reward.__class__ = Spy
    data = prompt_data(tmp_path, validation=None)
    trainer(tmp_path, max_epochs=5).fit(module, datamodule=data)
    assert len(seen) == 40
    texts = sorted(row["prompt"] for row in data.prompts("train"))
    assert sorted(seen) == sorted(texts * 4)


def test_several_completions_a_prompt(tmp_path: Path) -> None:
    module = policy(rollout={"num_prompts": 4, "completions_per_prompt": 4, "minibatch_size": 8, "passes": 1})
    with recorded(module) as batches:
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=prompt_data(tmp_path, validation=None))
    assert [len(b) for b in batches] == [8, 8]
    rows = {tuple(row.tolist()) for batch in batches for row in batch}
    assert len(rows) > 8, "completions of one prompt differ"


# ------------------------------------------------------------------------------------------ rewards and sizes


class Fixed(Reward):
    def __init__(self, values: Any) -> None:
        super().__init__(name="fixed")
        self.values = values

    def __call__(self, batch: Any) -> Any:
        if isinstance(self.values, Exception):
            raise self.values
        return self.values(len(batch))


@pytest.mark.parametrize(
    "values, match",
    [
        (lambda n: [float("nan")] * n, "reward 'fixed' returned nan for completion 0"),
        (lambda n: [1.0] * (n - 1), "reward 'fixed' returned 7 values; it must return 8 numbers"),
        (KeyError("answer"), "reward 'fixed' raised KeyError: 'answer'"),
        (lambda n: ["good"] * n, "reward 'fixed' returned 'good'"),
    ],
)
def test_a_reward_that_misbehaves_stops_the_run_before_a_step(values: Any, match: str, tmp_path: Path) -> None:
    module = policy(rewards=[Fixed(values)])
    run = trainer(tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=match):
        run.fit(module, datamodule=prompt_data(tmp_path))
    assert run.global_step == 0


def test_what_cannot_work_is_refused_when_it_is_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sampling\.max_new_tokens is 0: use at least 1"):
        Sampling(max_new_tokens=0)
    with pytest.raises(ValueError, match=r"sampling\.temperature must be positive"):
        policy(sampling=Sampling(temperature=0))
    with pytest.raises(ValueError, match=r"PPO needs a reward: add one under model.rewards"):
        policy(rewards=[])
    with pytest.raises(ValueError, match=r"two of .* share one"):
        policy(rewards=[PythonReward(letters), PythonReward(letters)])
    with pytest.raises(ValueError, match=r"8 rows .*, which rollout\.minibatch_size 3 does not divide"):
        trainer(tmp_path, max_epochs=1).fit(policy(rollout={"minibatch_size": 3}), datamodule=prompt_data(tmp_path))
    with pytest.raises(ValueError, match=r"more than the network's context|more than the network's max_length"):
        module = policy(sampling=Sampling(max_new_tokens=60))
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=prompt_data(tmp_path))


def test_validation_may_be_greedy(tmp_path: Path) -> None:
    module = preference_policy(sampling=Sampling(temperature=0, max_new_tokens=8))
    (found,) = trainer(tmp_path).validate(module, datamodule=prompt_data(tmp_path), verbose=False)
    assert found["val/kl"] == 0.0 and found["val/length"] > 0


def test_weights_are_gathered_by_a_process_that_has_nothing_but_fillers() -> None:
    """Gathering waits for all processes: one that left it out would stop the others."""
    entered = []

    class Watched(LitPolicy):
        @contextmanager
        def uneven_passes(self) -> Iterator[None]:
            entered.append(self)
            yield

    module = Watched(config(), Preference())
    batch = {"row": torch.tensor([-1]), "prompt_ids": [torch.tensor([65])], "prompts": ["A"], "columns": {}}
    assert module.evaluate_prompts(batch) == []
    assert len(entered) == 1


def test_rows_too_long_for_the_network_are_refused_whether_they_share_a_prompt_or_not() -> None:
    network = config(vocab_size=11, max_length=16).build()
    tokens = torch.ones(2, 20, dtype=torch.long)
    batch = Experience(tokens=tokens, mask=tokens > 0, loss_mask=torch.arange(20).expand(2, 20) > 15)
    for group in ([0, 1], [0, 0]):
        with pytest.raises(ValueError, match=r"20 tokens are more than max_length \(16\)"):
            language_model_output(network, Experience(batch | {"group": torch.tensor(group)}))
