"""The reward: what tokens and steps are worth, by hand; what it does with a checkpoint; what PPO makes of it."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lit_palm_implicit_reward import ImplicitPRM, ImplicitProcessReward
from lit_palm_implicit_reward.reward import step_ends
from torch import Tensor, nn

from lit_palm import (
    PPO,
    ByteTokenizer,
    DemonstrationData,
    LitLanguageModel,
    LitPolicy,
    PaLMConfig,
    PreferenceData,
    PromptData,
    PythonReward,
    RolloutConfig,
    Sampling,
    load_network,
)
from lit_palm.callbacks import LastCheckpoint
from lit_palm.rollout.rewards import total_reward
from lit_palm.testing import RewardConformance, tiny_network, tiny_reward_batch


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "log_every_n_steps": 1,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "callbacks": [LastCheckpoint(str(folder))],
    }  # fmt: skip
    return Trainer(default_root_dir=str(folder), **{**quiet, **options})


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class TestConformance(RewardConformance):
    @pytest.fixture(params=["token", "completion"])
    def reward(self, request: pytest.FixtureRequest) -> Any:
        return functools.partial(ImplicitProcessReward, "model.ckpt", "reference.ckpt", credit=request.param)


# ------------------------------------------------------------------------------------------ by hand


def ready(**options: Any) -> ImplicitProcessReward:
    """With two small networks and the tokeniser `bytes`."""
    made = ImplicitProcessReward("model.ckpt", "reference.ckpt", **{"beta": 0.5, "batch_size": 2, **options})
    torch.manual_seed(0)
    made.network = nn.ModuleDict({"model": tiny_network(), "reference": tiny_network()})
    made._decode = ByteTokenizer().decode
    return made


@torch.no_grad()
def test_tokens_and_steps_by_hand() -> None:
    """Every completion by itself, from full softmaxes; 1e-5 for float32."""
    texts = ["a\nbc\n", "d", "e\n\nf", "gh\ni"]
    batch = tiny_reward_batch(texts, ["p", "qq ", "r", "some prompt "])
    by_token, by_step = ready()(batch), ready(credit="step")(batch)
    whole, weakest = ready(credit="completion")(batch), ready(credit="weakest")(batch)
    network = ready().network
    assert isinstance(network, nn.ModuleDict)
    for row, (prompt, ids) in enumerate(zip(batch.prompt_ids, batch.completion_ids, strict=True)):
        tokens = torch.cat([prompt, ids])[None]
        logps = [torch.log_softmax(network[name](tokens)[0], -1) for name in ("model", "reference")]
        q, steps = 0.0, [0.0]
        for place, token in enumerate(ids.tolist()):
            at = len(prompt) + place
            worth = 0.5 * (logps[0][at - 1, token] - logps[1][at - 1, token]).item()
            assert by_token[row, at].item() == pytest.approx(worth, abs=1e-5)
            q += worth
            steps[-1] += worth
            if token == ord("\n") or place == len(ids) - 1:
                assert by_step[row, at].item() == pytest.approx(steps[-1], abs=1e-5)
                steps.append(0.0)
            else:
                assert by_step[row, at] == 0
        assert whole[row].item() == pytest.approx(q, abs=1e-5)
        assert weakest[row].item() == pytest.approx(min(steps[:-1]), abs=1e-5)
    inside = batch.completion_mask
    assert not by_token[~inside].any() and by_token[inside].abs().min() > 0
    for found in (by_token, by_step, whole):
        values = total_reward([PythonReward(lambda completions: [0.0] * 4), _As(found)], batch)[1]["as"]
        torch.testing.assert_close(values, whole, rtol=1e-5, atol=1e-5)


class _As(PythonReward):
    """Values that are known."""

    def __init__(self, found: Tensor) -> None:
        super().__init__(len, name="as")
        self.found = found

    def __call__(self, batch: Any) -> Tensor:
        return self.found


def test_where_steps_end() -> None:
    decode = ByteTokenizer().decode

    def ends(text: str, delimiter: str) -> list[int]:
        return step_ends(list(ByteTokenizer().encode(text)), decode, delimiter)

    assert ends("ab", "\n") == [1]
    assert ends("a\n\nb\n\nc", "\n\n") == [2, 5, 6]
    assert ends("a\nb", "\n\n") == [2]
    assert ends("x Step 2: y Step 3: z", "Step") == [5, 15, 20]
    pieces = ["so", "\n\nthen", "\n", "\n", "done"]  # tokens longer than the delimiter, and shorter
    assert step_ends(range(5), lambda ids: "".join(pieces[i] for i in ids), "\n\n") == [1, 3, 4]


@pytest.mark.parametrize(
    "options, reason",
    [({"beta": -1.0}, "beta of reward"), ({"credit": "word"}, "credit of reward"), ({"delimiter": ""}, "delimiter of"),
     ({"batch_size": 0}, "batch_size of")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ImplicitProcessReward("a", "b", **options)
    with pytest.raises(ValueError, match="reads at most 64"):
        ready()(tiny_reward_batch(["x" * 80]))


# ------------------------------------------------------------------------------------------ whole


LETTERS, LENGTH = "abcdefgh", 6


def text(chance: random.Random, bad: bool) -> str:
    """Six letters; a bad text has one `x` somewhere."""
    letters = [chance.choice(LETTERS) for _ in range(LENGTH)]
    if bad:
        letters[chance.randrange(LENGTH)] = "x"
    return "".join(letters)


def without_x(completions: list[str]) -> list[float]:
    """The outcome: a completion is right when nothing in it is wrong."""
    return [float("x" not in text) for text in completions]


def test_from_outcomes_to_blame_to_a_better_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole completions are said to be right or wrong; the reward blames the letter; PPO with it stops writing that."""
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    chance = random.Random(0)
    texts = [(text(chance, i % 2 == 1), i % 2 == 0) for i in range(400)]
    network = PaLMConfig(d_model=32, num_layers=2, num_heads=2, head_dim=16, max_length=32)

    def adam(lr: float) -> Any:
        return lambda params: torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)

    # what it starts from writes both kinds alike
    torch.manual_seed(0)
    demos = write(tmp_path / "demos.jsonl", [{"prompt": ">", "completion": t} for t, _ in texts])
    data: Any = DemonstrationData(train=demos, tokenizer="bytes", batch_size=40)
    sft = tmp_path / "sft"
    trainer(sft, max_epochs=10, callbacks=[LastCheckpoint(str(sft))]).fit(
        LitLanguageModel(network, optimizer=adam(5e-3)), datamodule=data
    )
    start = str(sft / "last.ckpt")
    # outcomes
    rated = write(tmp_path / "outcomes.jsonl", [{"prompt": ">", "completion": t, "label": y} for t, y in texts])
    prm = tmp_path / "prm"
    run = trainer(prm, max_epochs=4, callbacks=[LastCheckpoint(str(prm))])
    run.fit(
        LitPolicy(start, ImplicitPRM(beta=2.0), optimizer=adam(2e-3)),
        datamodule=PreferenceData(train=rated, batch_size=40),
    )
    assert run.callback_metrics["accuracy"] > 0.9

    # blame, on texts that nobody rated
    reward = ImplicitProcessReward(str(prm / "last.ckpt"), start, beta=2.0)
    reward.network = reward.build(load_network)  # type: ignore[arg-type]
    held = [text(chance, i % 2 == 1) for i in range(200)]
    batch = tiny_reward_batch(held, [">"] * 200)
    values, scores = reward(batch), total_reward([reward], batch)[0]
    begin = len(batch.prompt_ids[0])
    blamed = [values[i, begin : begin + LENGTH].argmin().item() == held[i].index("x") for i in range(1, 200, 2)]
    right = [(scores[i] > 0) == (i % 2 == 0) for i in range(200)]
    assert sum(blamed) >= 90 and sum(map(bool, right)) >= 180, (sum(blamed), sum(map(bool, right)))

    # the policy
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": ">"}] * 64)
    torch.manual_seed(0)
    policy = LitPolicy(
        start,
        PPO(kl_coef=0.05, missing_eos_penalty=3.0),
        rewards=[ImplicitProcessReward(str(prm / "last.ckpt"), start, beta=2.0), PythonReward(without_x, weight=0.0)],
        rollout=RolloutConfig(num_prompts=64, minibatch_size=32, passes=2),
        sampling=Sampling(max_new_tokens=LENGTH + 2),
        optimizer=adam(1e-3),
    )
    prompted = PromptData(train=prompts, validation=prompts, batch_size=64)
    run = trainer(tmp_path, max_epochs=16, check_val_every_n_epoch=16)
    before = run.validate(policy, datamodule=prompted, verbose=False)[0]["val/rewards/without_x"]
    run.fit(policy, datamodule=prompted)
    after = float(run.callback_metrics["val/rewards/without_x"])
    assert before < 0.65 and after > 0.9, (before, after)
