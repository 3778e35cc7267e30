"""OnlineDPO: which completions become a pair, what is reported, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lit_palm_dpo import DPO, OnlineDPO

from lit_palm import Experience, Output

SCORES = [[0.5, 2.0, -1.0], [3.0, 3.0, 3.0], [1.0, 0.0, 0.0], [4.0, 4.0, 1.0]]


def collection(scores: list[list[float]], shuffled: bool = False) -> Experience:
    """Completions of three or so tokens, `tokens[:, 0]` is the row's number."""
    size = len(scores[0])
    num_rows = len(scores) * size
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 6, (num_rows,), generator=generator)
    mask = torch.arange(5) < lengths[:, None]
    tokens = torch.randint(1, 9, (num_rows, 5), generator=generator)
    tokens[:, 0] = torch.arange(num_rows)
    logps = -torch.rand(num_rows, 5, generator=generator)
    experience = Experience(
        tokens=tokens,
        mask=mask,
        loss_mask=mask & (torch.arange(5) > 0),
        row=torch.arange(num_rows),
        group=torch.arange(num_rows) // size,
        scores=torch.tensor(scores).flatten(),
        ended=torch.arange(num_rows) % 2 == 0,
        old_logps=logps,
        ref_logps=logps - 0.1,
    )
    if shuffled:
        experience = experience.select(torch.randperm(num_rows, generator=generator))
    experience["rewards"] = {"one": experience["scores"]}
    return experience


@pytest.mark.parametrize("shuffled", [False, True])
def test_best_and_worst_of_a_prompt_become_a_pair(shuffled: bool) -> None:
    objective = OnlineDPO()
    kept = objective.prepare(collection(SCORES, shuffled))
    assert kept.num_rows == objective.num_kept(4, 3) == 8
    assert kept["group"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert kept["rank"].tolist() == [0, 1, 0, 0, 0, 1, 0, 1]
    assert kept["scores"].view(-1, 2).tolist() == [[2, -1], [3, 3], [1, 0], [4, 1]]
    assert len(kept["tokens"][:, 0].unique()) == 8, "no row twice, not even where all score alike"
    assert kept["tokens"][:, 0].tolist() == [1, 2, 3, 5, 6, 8, 9, 11]
    assert objective.weight(kept) == 3


def test_the_loss_is_that_of_dpo_with_the_references_of_the_collection() -> None:
    objective = OnlineDPO(losses=["sigmoid", "sft"], loss_weights=[1.0, 0.2], beta=0.3)
    kept = objective.prepare(collection(SCORES))
    logps = (kept["old_logps"] * 1.1).requires_grad_()
    plain = DPO(["sigmoid", "sft"], [1.0, 0.2], 0.3)
    expected = plain.loss(Output(logps=logps, ref_logps=kept["ref_logps"]), kept).total
    assert objective.loss(Output(logps=logps), kept).total == expected
    weight: Any = objective.weight(kept)
    assert weight["sft"] == kept["loss_mask"][[0, 4, 6]].sum(), "of ties neither is imitated"


def test_metrics_describe_the_whole_collection() -> None:
    experience = collection(SCORES)
    entropy = -torch.where(experience["loss_mask"], experience["old_logps"], 0).sum() / 12
    tokens = experience["loss_mask"].sum() / 12
    metrics = OnlineDPO().prepare(experience)["metrics"]
    table = torch.tensor(SCORES)
    assert metrics == pytest.approx(
        {
            "objective/scores": table.mean().item(),
            "objective/scores_margin": (3 + 0 + 1 + 3) / 4,
            "reward": table.mean().item(),
            "reward_std": table.std(1).mean().item(),
            "frac_reward_zero_std": 0.25,
            "val/num_eos_tokens": 6,
            "objective/entropy": entropy.item(),
            "objective/kl": 0.1 * tokens.item(),
        }
    )


def test_without_a_reference_no_divergence_is_reported() -> None:
    objective = OnlineDPO(reference_free=True)
    assert objective.needs == {"rollouts", "reward", "old_logps"}
    experience = collection(SCORES)
    del experience["ref_logps"]
    kept = objective.prepare(experience)
    assert "objective/kl" not in kept["metrics"]
    assert objective.loss(Output(logps=kept["old_logps"]), kept).total > 0
    assert OnlineDPO().needs == {"rollouts", "reward", "reference", "old_logps"}


def test_a_completion_without_an_end_is_charged_before_the_choice() -> None:
    """Rows 1, 3 and 5 did not end: with a penalty of 5 the best of the first prompt is another."""
    kept = OnlineDPO(missing_eos_penalty=5.0).prepare(collection(SCORES))
    assert kept["tokens"][:4, 0].tolist() == [0, 1, 4, 5]
    assert kept["rank"][:4].tolist() == [0, 1, 0, 1]
    assert kept["metrics"]["objective/scores"] == pytest.approx(torch.tensor(SCORES).mean().item())
    assert kept["metrics"]["reward"] == pytest.approx(torch.tensor(SCORES).mean().item() - 2.5)


def test_margins_are_differences_of_scores() -> None:
    objective = OnlineDPO(margin=True)
    kept = objective.prepare(collection(SCORES))
    assert kept["margin"].tolist() == [3, 3, 0, 0, 1, 1, 3, 3]
    logps = kept["old_logps"]
    expected = DPO(margin=True).loss(Output(logps=logps, ref_logps=kept["ref_logps"]), kept).total
    assert (
        objective.loss(Output(logps=logps), kept).total == expected > OnlineDPO().loss(Output(logps=logps), kept).total
    )


def test_one_completion_a_prompt_makes_no_pair() -> None:
    with pytest.raises(ValueError, match=r"rollout\.completions_per_prompt to 2 or more"):
        OnlineDPO().num_kept(8, 1)
    assert OnlineDPO().num_kept(8, 2) == OnlineDPO().num_kept(8, 5) == 16
    with pytest.raises(ValueError, match="unknown loss"):
        OnlineDPO(losses="dpo")
