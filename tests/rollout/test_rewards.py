"""Rewards: what they receive, what they may return, and that a reward model reads the last real token."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_palm.rollout.rewards import PythonReward, Reward, RewardBatch, RewardModel, total_reward


def make_batch(lengths: list[int] | None = None, **columns: list) -> RewardBatch:
    """Prompts of one token and completions of the rest; row i holds the ids 10 i + 1, 10 i + 2, ..."""
    lengths = lengths or [3, 5, 2]
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens[row, :length] = 10 * row + 1 + torch.arange(length)
    return RewardBatch(
        prompts=[f"p{row}" for row in range(len(lengths))],
        completions=[f"completion {row}" for row in range(len(lengths))],
        prompt_ids=[tokens[row, :1] for row in range(len(lengths))],
        completion_ids=[tokens[row, 1:length] for row, length in enumerate(lengths)],
        ended=[True] * len(lengths),
        tokens=tokens,
        mask=torch.arange(max(lengths)) < torch.tensor(lengths)[:, None],
        columns=dict(columns),
    )


class LastToken(nn.Module):
    """Says the id of each token as its score, in float32, with dropout that would spoil it."""

    def __init__(self, max_length: int = 64) -> None:
        super().__init__()
        self.trunk = SimpleNamespace(config=SimpleNamespace(max_length=max_length))
        self.anchor = nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(0.9)
        self.widths: list[tuple[int, ...]] = []

    def forward(self, tokens: Tensor) -> Tensor:
        self.widths.append(tuple(tokens.shape))
        return self.dropout(tokens.float() + self.anchor)


def length_reward(completions: list[str], **columns: object) -> list[float]:
    return [float(len(text)) for text in completions]


def test_reward_model_scores_the_last_real_token_in_sorted_batches() -> None:
    lengths = [3, 9, 1, 7, 2]
    batch = make_batch(lengths)
    reward = RewardModel("some.ckpt", batch_size=2)
    asked = []
    network = reward.build(lambda path, role: asked.append((path, role)) or LastToken())
    assert asked == [("some.ckpt", "reward")]
    reward.network = network.train()
    scores = reward(batch)
    assert scores.tolist() == [float(10 * row + length) for row, length in enumerate(lengths)]
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert network.widths == [(2, 9), (1, 3), (2, 2)]  # longest first, each batch as wide as its longest row
    assert network.training  # dropout was off for scoring only


def test_reward_model_on_a_real_network_ignores_padding_and_batching() -> None:
    from lit_palm.models.base import ScalarNetwork
    from lit_palm.models.palm import PaLMConfig

    torch.manual_seed(0)
    config = PaLMConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=2, head_dim=8, max_length=16)
    network = ScalarNetwork(config.build())
    batch = make_batch([3, 9, 1, 7, 2])
    alone = [network(batch.tokens[i : i + 1, :n])[0, -1].item() for i, n in enumerate([3, 9, 1, 7, 2])]
    for batch_size in (1, 2, 64):
        reward = RewardModel("some.ckpt", batch_size=batch_size)
        reward.network = network
        # float32, other shapes of the same matrix products
        assert reward(batch).tolist() == pytest.approx(alone, abs=1e-5)


def test_reward_model_refuses_what_it_cannot_read() -> None:
    reward = RewardModel("some.ckpt")
    reward.network = LastToken(max_length=4)
    with pytest.raises(ValueError, match=r"row 1 has 5 tokens and the reward model some\.ckpt reads at most 4"):
        reward(make_batch())
    empty = make_batch()
    empty.mask[2] = False
    with pytest.raises(ValueError, match="row 2 has no tokens"):
        reward(empty)
    with pytest.raises(ValueError, match="batch_size"):
        RewardModel("some.ckpt", batch_size=0)


def test_function_receives_ids_text_and_every_column() -> None:
    seen = {}

    def spy(**given: object) -> list[float]:
        seen.update(given)
        return [0.0, 1.0, 2.0]

    batch = make_batch(answer=["a", "b", "c"], level=[1, 2, 3])
    assert list(PythonReward(spy)(batch)) == [0.0, 1.0, 2.0]
    assert seen.keys() == {"prompts", "completions", "prompt_ids", "completion_ids", "answer", "level"}
    assert seen["answer"] == ["a", "b", "c"] and seen["completions"] == batch.completions
    assert torch.equal(seen["completion_ids"][1], batch.completion_ids[1])  # type: ignore[index]


def test_function_may_name_only_what_it_wants() -> None:
    def equal(completions: list[str], answer: list[str], bonus: float = 0.5) -> list[float]:
        return [bonus + (c == a) for c, a in zip(completions, answer, strict=True)]

    assert PythonReward(equal)(make_batch(answer=["completion 0", "x", "x"], other=[0, 0, 0])) == [1.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="'equal' raised ValueError: its function needs answer; the data offers"):
        total_reward([PythonReward(equal)], make_batch(other=[0, 0, 0]))
    with pytest.raises(ValueError, match="a column 'prompts'"):
        PythonReward(length_reward)(make_batch(prompts=["a", "b", "c"]))


def test_function_by_path(tmp_path, monkeypatch) -> None:
    (tmp_path / "tiny_rewards_here.py").write_text(
        "def zero(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    reward = PythonReward("tiny_rewards_here.zero")
    assert reward.name == "zero" and reward(make_batch()) == [0.0] * 3
    with pytest.raises(ValueError, match=r"'tiny_rewards_here.one' cannot be imported \(AttributeError"):
        PythonReward("tiny_rewards_here.one")
    with pytest.raises(ValueError, match=r"'nowhere_at_all\.f' cannot be imported \(ModuleNotFoundError"):
        PythonReward("nowhere_at_all.f")
    with pytest.raises(ValueError, match=r"package\.module\.function"):
        PythonReward("zero")
    with pytest.raises(ValueError, match="is a float, which is not callable"):
        PythonReward("math.pi")


def test_sum_is_weighted_and_values_are_not() -> None:
    rewards = [
        PythonReward(lambda **_: [1.0, 2.0, 3.0], weight=2.0, name="first"),
        PythonReward(lambda **_: torch.tensor([1, 0, 1]), weight=-0.5, name="second"),
        PythonReward(lambda **_: [True, False, np.float64(0.25)], weight=1.0, name="third"),
        PythonReward(lambda **_: np.array([0.0, 0.0, 1.0]), weight=0.0, name="fourth"),
    ]
    scores, values = total_reward(rewards, make_batch())
    assert scores.tolist() == [2.5, 4.0, 5.75]
    assert {name: value.tolist() for name, value in values.items()} == {
        "first": [1.0, 2.0, 3.0],
        "second": [1.0, 0.0, 1.0],
        "third": [1.0, 0.0, 0.25],
        "fourth": [0.0, 0.0, 1.0],
    }
    assert scores.dtype == torch.float32


def raising(**_: object) -> list[float]:
    raise KeyError("answer")


BAD = {
    "raises": (raising, r"raised KeyError: 'answer'"),
    "NaN": (lambda **_: [0.0, math.nan, 0.0], "returned nan for completion 1: 'completion 1'"),
    "infinity": (lambda **_: torch.tensor([0.0, 0.0, -math.inf]), "returned -inf for completion 2"),
    "overflow": (lambda **_: [0.0, 1e300, 0.0], "returned inf for completion 1"),
    "short": (lambda **_: [0.0, 1.0], "returned 2 values; it must return 3 numbers"),
    "long": (lambda **_: torch.zeros(4), "returned 4 values; it must return 3"),
    "shape": (lambda **_: torch.zeros(3, 1), r"a tensor of shape \[3, 1\]"),
    "number": (lambda **_: 1.0, "returned a float"),
    "scalar tensor": (lambda **_: torch.tensor(1.0), r"a tensor of shape \[\]"),
    "None": (lambda **_: None, "returned a NoneType"),
    "None inside": (lambda **_: [0.0, None, 0.0], "returned None for completion 1"),
    "text": (lambda **_: "abc", "returned a str"),
    "text inside": (lambda **_: ["1", "2", "3"], "returned '1' for completion 0"),
    "dictionary": (lambda **_: {0: 1.0, 1: 1.0, 2: 1.0}, "returned a dict"),
    "nested": (lambda **_: [[0.0] * 99, [1.0], [2.0]], r"returned 99 numbers for completion 0, which has \d+ tokens"),
    "nested too deep": (lambda **_: [[[0.0]], [1.0], 2.0], r"returned \[\[0.0\]\] for completion 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_name_the_reward(case: str) -> None:
    function, message = BAD[case]
    good = PythonReward(length_reward)
    with pytest.raises(ValueError, match=f"reward 'wrong' .*{message}"):
        total_reward([good, PythonReward(function, name="wrong")], make_batch())


def test_names_are_unique_and_there_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="two rewards are called 'length_reward'"):
        total_reward([PythonReward(length_reward), PythonReward(length_reward)], make_batch())
    with pytest.raises(ValueError, match="no reward"):
        total_reward([], make_batch())
    with pytest.raises(ValueError, match="weight of PythonReward is nan"):
        PythonReward(length_reward, weight=math.nan)


def test_a_reward_of_ones_own_needs_only_call() -> None:
    class ShortAnswers(Reward):
        API_VERSION = 1

        def __init__(self) -> None:  # without calling the base's
            self.limit = 2

        def __call__(self, batch: RewardBatch) -> list[float]:
            return [float(len(ids) <= self.limit) for ids in batch.completion_ids]

    reward = ShortAnswers()
    assert reward.name == "short_answers" and reward.weight == 1.0 and reward.build(lambda *_: nn.Identity()) is None
    scores, values = total_reward([reward], make_batch())
    assert scores.tolist() == [1.0, 0.0, 1.0] and values.keys() == {"short_answers"}


def test_yaml_names_rewards() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=list[Reward])
    text = (
        '[{"class_path": "PythonReward", "init_args": {"function": "math.fsum", "weight": 0.5, "name": "sum"}},'
        '{"class_path": "RewardModel", "init_args": {"checkpoint": "reward.ckpt"}}]'
    )
    config = parser.parse_args([f"--rewards={text}"])
    rewards = parser.instantiate_classes(config).rewards
    assert [reward.name for reward in rewards] == ["sum", "reward_model"] and rewards[0].function is math.fsum
    assert "math.fsum" in parser.dump(config)
