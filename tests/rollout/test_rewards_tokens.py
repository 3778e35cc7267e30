"""Rewards that speak of single tokens: how they add up, what is refused, and PPO with them against loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lit_palm.objectives import PPO
from lit_palm.rollout.rewards import Ensemble, PythonReward, Reward, RewardBatch, reward_totals, total_reward
from lit_palm.testing import tiny_experience, tiny_reward_batch
from lit_palm.types import Experience
from tests.support import apart, everything, lower_case, policy, prompt_data, trainer


class ByToken(Reward):
    """What a function of batch says of every token."""

    API_VERSION: ClassVar[int] = 1

    def __init__(self, function: Any, weight: float = 1.0, name: str = "by_token") -> None:
        super().__init__(weight, name)
        self.function = function

    def __call__(self, batch: RewardBatch) -> Tensor:
        found: Tensor = self.function(batch)
        return found


def ids(batch: RewardBatch) -> Tensor:
    """A token is worth a hundredth of its id, in the prompt and the padding too."""
    return batch.tokens / 100


def lengths(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def test_the_sum_over_the_completion_is_the_score() -> None:
    batch = tiny_reward_batch(["ab", "c", "dddd"], ["a long prompt", "x", "y "])
    rewards = [ByToken(ids, weight=0.5), PythonReward(lengths, weight=2.0), ByToken(ids, name="again")]
    scores, values, tokens = reward_totals(rewards, batch)
    assert tokens is not None and values.keys() == {"by_token", "lengths", "again"}
    for row, (completion, prompt) in enumerate(zip(batch.completion_ids, batch.prompt_ids, strict=True)):
        worth = completion.sum().item() / 100
        assert values["by_token"][row].item() == pytest.approx(worth, rel=1e-6)
        assert scores[row].item() == pytest.approx(1.5 * worth + 2 * len(batch.completions[row]), rel=1e-6)
        own = torch.zeros(batch.tokens.shape[1])
        own[len(prompt) : len(prompt) + len(completion)] = 1.5 * completion / 100
        torch.testing.assert_close(tokens[row], own)
    assert reward_totals([PythonReward(lengths)], batch).tokens is None
    assert total_reward(rewards, batch)[0].tolist() == scores.tolist()
    both = Ensemble([ByToken(ids), PythonReward(lengths)], combine="min")
    assert reward_totals([both], batch).tokens is None, "the smaller of two scores is no one's tokens"
    assert reward_totals([both], batch).values["ensemble/by_token"].tolist() == values["by_token"].tolist()


def test_what_no_token_can_be_worth_is_refused() -> None:
    batch = tiny_reward_batch(["ab", "c"])
    with pytest.raises(ValueError, match=r"reward 'by_token' returned a tensor of shape \[2, 3\]; values of tokens"):
        total_reward([ByToken(lambda batch: torch.zeros(2, 3))], batch)
    nan = torch.zeros(batch.tokens.shape)
    nan[0, 0] = nan[1, -1] = float("nan")  # in the prompt, and after the completion
    assert total_reward([ByToken(lambda batch: nan)], batch)[0].tolist() == [0, 0]
    nan[1, len(batch.prompt_ids[1]) + 1] = float("inf")
    with pytest.raises(ValueError, match="reward 'by_token' returned inf for token 1 of completion 1: 'c'"):
        total_reward([ByToken(lambda batch: nan)], batch)


def test_a_function_may_say_it_in_lists() -> None:
    """One number for each of `completion_ids`, which end with EOS."""
    batch = tiny_reward_batch(["ab", "c"], ["a prompt", "x"])

    def places(completion_ids: list[Tensor]) -> list[list[float]]:
        return [[float(place) for place in range(len(ids))] for ids in completion_ids]

    scores, _, tokens = reward_totals([PythonReward(places, weight=2.0)], batch)
    assert scores.tolist() == [6, 2] and tokens is not None
    assert tokens[0, len(batch.prompt_ids[0]) :].tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="'short' returned 1 numbers for completion 0, which has 3 tokens: return one"):
        total_reward([PythonReward(lambda completions: [[1.0], [2.0]], name="short")], batch)


# ------------------------------------------------------------------------------------------ PPO


def at_the_end(batch: RewardBatch) -> Tensor:
    """What `lower_case` says, at the last token, and nothing before it."""
    last = batch.mask.sum(1) - 1
    values = torch.tensor(lower_case(batch.completions))
    return torch.zeros(batch.tokens.shape).scatter(1, last[:, None], values[:, None])


@pytest.mark.parametrize("options", [{}, {"scale_reward": "running", "center_reward": True, "clip_reward": 1.0}])
def test_a_reward_at_the_last_token_alone_is_the_score(options: dict[str, Any], tmp_path: Path) -> None:
    """The same bits in weights, optimiser and objective after several collections."""

    def fit(reward: Reward) -> Any:
        run = trainer(tmp_path, max_epochs=2)
        run.fit(policy(ppo=options, rewards=[reward]), datamodule=prompt_data(tmp_path))
        return everything(run)

    one, other = fit(PythonReward(lower_case)), fit(ByToken(at_the_end))
    assert apart(one["weights"], other["weights"]) == 0
    assert str(one["objective"]) == str(other["objective"])
    spread = fit(ByToken(lambda batch: torch.where(batch.completion_mask, 0.1 * (batch.tokens % 7), 0)))
    assert apart(one["weights"], spread["weights"]) > 1e-6, "what tokens are worth is learned from"


def collection(dense: bool) -> Experience:
    objective = PPO()
    experience = tiny_experience("prompts", objective.needs)
    if dense:
        generator = torch.Generator().manual_seed(5)
        values = torch.randn(experience["tokens"].shape, generator=generator, dtype=torch.float64)
        experience["token_rewards"] = torch.where(experience["loss_mask"], values, 0)
        # a part of the score, beside what was said of the whole
        experience["scores"] = experience["scores"] + experience["token_rewards"].sum(1)
    return experience


@pytest.mark.parametrize("options", [{}, {"scale_reward": "ref"}, {"clip_reward": 0.4, "missing_eos_penalty": 0.3}])
def test_each_token_gets_its_own_and_the_last_one_the_rest(options: dict[str, Any]) -> None:
    """Against a loop over tokens, with gamma and lambda below 1; float64."""
    objective = PPO(gamma=0.9, lam=0.8, whiten_advantages=False, kl_coef=0.2, **options)
    experience = collection(dense=True)
    prepared = objective.prepare(Experience(experience))
    scale = experience["scores"].std().item() if options.get("scale_reward") else 1.0
    for b in range(experience.num_rows):
        places = experience["loss_mask"][b].nonzero().squeeze(1).tolist()
        score = experience["scores"][b].item() / scale
        if "clip_reward" in options:
            score = min(max(score, -0.4), 0.4) - (0 if experience["ended"][b] else 0.3)
        own = [experience["token_rewards"][b, t].item() / scale for t in places[:-1]]
        rewards = [*own, score - sum(own)]
        values = [experience["values"][b, t].item() for t in places] + [0.0]
        advantage = 0.0
        for k in reversed(range(len(places))):
            apart = experience["old_logps"][b, places[k]] - experience["ref_logps"][b, places[k]]
            delta = rewards[k] - 0.2 * apart.item() + 0.9 * values[k + 1] - values[k]
            advantage = delta + 0.9 * 0.8 * advantage
            assert prepared["advantages"][b, places[k]].item() == pytest.approx(advantage, rel=1e-9, abs=1e-9)
    assert prepared["metrics"]["objective/scores"] == pytest.approx(experience["scores"].mean().item())


def test_rounds_of_other_widths_keep_what_tokens_are_worth() -> None:
    from lit_palm.rollout.collector import merge

    parts = []
    for place, text in enumerate(["a", "longer one"]):
        batch = tiny_reward_batch([text])
        row = Experience(tokens=batch.tokens, mask=batch.mask, loss_mask=batch.completion_mask)
        row["row"], row["group"] = torch.tensor([place]), torch.tensor([place])
        row["token_rewards"] = reward_totals([ByToken(ids)], batch).tokens
        parts.append(row)
    merged = merge(parts, pad_id=0)
    for place, part in enumerate(parts):
        width = part["tokens"].shape[1]
        assert merged["token_rewards"][place, :width].tolist() == part["token_rewards"][0].tolist()
        assert not merged["token_rewards"][place, width:].any()
