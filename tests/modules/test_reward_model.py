"""LitRewardModel: it learns what people prefer, its score is calibrated, a ranking is one element."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_palm.data import PreferenceData
from lit_palm.modules import LitRewardModel
from lit_palm.modules.reward_model import last_scores
from lit_palm.modules.weights import load_network
from lit_palm.objectives import RewardRegression
from tests.support import config, ranking_data, reward_model, sentence, trainer, weights, write_jsonl


def validation_scores(module: LitRewardModel, data: PreferenceData, calibrated: bool = True) -> Tensor:
    network = module.networks["reward"].eval()
    with torch.no_grad():
        return torch.cat([last_scores(network, b["tokens"], b["mask"], calibrated) for b in data.val_dataloader()])


def planted(folder: Path, count: int, start: int = 0) -> str:
    """Pairs of which the chosen one says `yes`, wherever it says it."""

    def row(i: int) -> dict[str, Any]:
        words = sentence(i).split()
        good, bad = list(words), list(words)
        good.insert(i % (len(words) + 1), "yes")
        bad.insert((i + 1) % (len(words) + 1), "not")
        return {"prompt": "say: ", "chosen": " ".join(good), "rejected": " ".join(bad)}

    return write_jsonl(folder / f"pairs{start}.jsonl", [row(i) for i in range(start, start + count)])


def test_it_learns_a_planted_preference(tmp_path: Path) -> None:
    data = PreferenceData(train=planted(tmp_path, 64), validation=planted(tmp_path, 32, 100), tokenizer="bytes",
                          batch_size=16)  # fmt: skip
    module = reward_model(
        network=config(d_model=32), calibrate="whiten", optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3)
    )
    run = trainer(tmp_path, max_epochs=15, check_val_every_n_epoch=15)
    run.fit(module, datamodule=data)
    assert run.callback_metrics["val/accuracy"].item() >= 0.9  # chance is .5
    assert run.callback_metrics["val/margin"].item() > 0
    scores = validation_scores(module, data).view(-1, 2)
    assert (scores[:, 0] > scores[:, 1]).float().mean() >= 0.9, "the calibration keeps the order"


@pytest.mark.parametrize("calibrate", ["whiten", "mean", "none"])
def test_calibration_over_the_validation_answers(calibrate: str, tmp_path: Path) -> None:
    module, data = reward_model(calibrate=calibrate), ranking_data(tmp_path, eval_batch_size=2)
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)
    raw, scores = validation_scores(module, data, calibrated=False), validation_scores(module, data)
    if calibrate == "none":
        assert torch.equal(raw, scores)
        return
    assert abs(scores.mean()) < 1e-5 < abs(raw.mean())  # float32 sums of a few dozen numbers of size 1
    if calibrate == "whiten":
        assert scores.std().item() == pytest.approx(1, abs=1e-5) and abs(raw.std() - 1) > 1e-2
    else:
        torch.testing.assert_close(scores, raw - raw.mean(), rtol=0, atol=1e-6)


def test_calibration_changes_neither_the_loss_nor_what_is_learned(tmp_path: Path) -> None:
    ended = {}
    for calibrate in ("none", "whiten"):
        module = reward_model(calibrate=calibrate)
        run = trainer(tmp_path, max_epochs=3)
        run.fit(module, datamodule=ranking_data(tmp_path))
        metrics = {k: float(v) for k, v in run.callback_metrics.items()}
        learned = {k: v for k, v in weights(module).items() if not k.endswith((".offset", ".scale"))}
        ended[calibrate] = learned, metrics
    assert all(torch.equal(ended["none"][0][k], v) for k, v in ended["whiten"][0].items())
    assert ended["none"][1] == ended["whiten"][1]


def test_a_ranking_is_the_mean_over_its_pairs_and_counts_once(tmp_path: Path) -> None:
    """One step of gradient descent, against the definition with a forward pass for every answer."""
    module = reward_model(optimizer=lambda params: torch.optim.SGD(params, lr=1.0))
    rankings = [
        {"prompt": "p", "completions": ["aa", "b", "cccc"], "ranks": [0, 1, 2]},
        {"prompt": "q", "completions": ["long one", "short"], "ranks": [1, 0]},
        {"prompt": "r", "completions": ["x", "y", "zz"], "ranks": [0, 1, 1]},
    ]
    data = PreferenceData(train=write_jsonl(tmp_path / "r.jsonl", rankings), tokenizer="bytes", batch_size=3)
    data.setup("fit")
    module.tokenizer = data.tokenizer
    module.configure_model()
    network = copy.deepcopy(module.networks["reward"])
    trainer(tmp_path, max_steps=1).fit(module, datamodule=data)

    def score(prompt: str, answer: str) -> Tensor:
        ids = [258, *prompt.encode(), *answer.encode(), 257]
        return network(torch.tensor([ids]))[0, -1]

    total = torch.zeros(())
    for row in rankings:
        answers = list(zip(row["completions"], row["ranks"], strict=True))
        pairs = [(a, b) for (a, i), (b, j) in itertools.permutations(answers, 2) if i < j]
        losses = [-torch.log(torch.sigmoid(score(row["prompt"], a) - score(row["prompt"], b))) for a, b in pairs]
        total = total + torch.stack(losses).mean() / len(rankings)
    total.backward()
    after = weights(module)
    for name, parameter in network.named_parameters():
        expected = parameter.detach() - parameter.grad
        torch.testing.assert_close(after[f"networks.reward.{name}"], expected, rtol=1e-5, atol=1e-6)


def test_ratings_are_regressed(tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": sentence(i), "rating": len(sentence(i)) / 10 - 1} for i in range(48)]
    path = write_jsonl(tmp_path / "ratings.jsonl", rows)
    data = PreferenceData(train=path, validation=path, tokenizer="bytes", batch_size=8)
    module = reward_model(
        objective=RewardRegression(), calibrate="none", optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3)
    )
    run = trainer(tmp_path, max_epochs=20)
    run.validate(module, datamodule=data, verbose=False)
    before = run.callback_metrics["val/mae"].item()
    run.fit(module, datamodule=data)
    assert run.callback_metrics["val/mae"].item() < 0.5 * before


def test_prediction_gives_calibrated_scores_by_group(tmp_path: Path) -> None:
    module = reward_model(calibrate="whiten")
    data = ranking_data(tmp_path, predict=str(tmp_path / "held_rankings.jsonl"))
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)
    batches = trainer(tmp_path).predict(module, datamodule=data)
    assert batches is not None
    scores = torch.cat([b["scores"] for b in batches])
    torch.testing.assert_close(scores, validation_scores(module, data))
    assert torch.cat([b["group"] for b in batches]).unique().tolist() == list(range(6))


def test_training_goes_on_from_a_reward_model(stages: dict[str, Path], tmp_path: Path) -> None:
    module = reward_model(network=str(stages["reward_model"]))
    data = ranking_data(tmp_path, tokenizer=None)
    trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    there = load_network(stages["reward_model"], "reward").state_dict()
    assert all(torch.equal(v, there[k.removeprefix("networks.reward.")]) for k, v in weights(module).items())


def test_data_without_what_the_objective_reads_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": sentence(i), "rating": float(i)} for i in range(4)]
    data = PreferenceData(train=write_jsonl(tmp_path / "ratings.jsonl", rows), tokenizer="bytes", batch_size=2)
    with pytest.raises(ValueError, match=r"RewardRanking needs the field 'rank' in every batch; .* gives .*rating"):
        trainer(tmp_path, max_steps=1).fit(reward_model(), datamodule=data)
