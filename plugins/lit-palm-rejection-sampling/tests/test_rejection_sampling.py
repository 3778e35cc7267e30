"""Which completions are kept, against a slow loop; the loss; and rounds through the public door."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lit_palm_rejection_sampling import RAFT, RFT, RejectionSampling

from lit_palm import Experience, LitPolicy, Output, PaLMConfig, PromptData, PythonReward, RolloutConfig, Sampling
from lit_palm.callbacks import LastCheckpoint, RolloutWriter


def round_of(scores: list[list[float]], texts: list[list[int]] | None = None, seed: int = 0) -> Experience:
    """A round with the given scores a prompt, its rows in a mixed order; equal `texts` are equal completions."""
    rows = []
    for group, of_prompt in enumerate(scores):
        for i, score in enumerate(of_prompt):
            text = 100 * group + i if texts is None else texts[group][i]
            rows.append((len(rows), group, score, text))
    random.Random(seed).shuffle(rows)
    number, group, score, text = (torch.tensor(column) for column in zip(*rows, strict=True))
    tokens = torch.stack([group, text, number % 3], 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 2] = text % 2 == 0  # completions of one and of two tokens
    tokens[:, 2] = torch.where(mask[:, 2], text % 5, 0)
    return Experience(
        tokens=tokens,
        mask=mask,
        loss_mask=mask & torch.tensor([False, True, True]),
        row=number,
        group=group,
        scores=score.float(),
        ended=text % 7 != 0,
    )


def kept(objective: RejectionSampling, experience: Experience) -> list[int]:
    return sorted(objective.prepare(Experience(experience))["row"].tolist())


def by_hand(rows: list[dict[str, Any]], objective: RejectionSampling, percentile: float) -> list[int]:
    """The papers' selections once more, as a loop over rows in the order of their numbers."""
    rows = sorted(rows, key=lambda r: r["row"])
    if objective.distinct:
        seen: set[Any] = set()
        rows = [r for r in rows if (r["group"], r["text"]) not in seen and not seen.add((r["group"], r["text"]))]  # type: ignore[func-returns-value]
    if objective.require_end:
        rows = [r for r in rows if r["ended"]]
    if objective.keep == "threshold":
        rows = [r for r in rows if r["score"] >= objective.threshold]
    if objective.keep == "percentile" and rows:
        values = sorted(r["score"] for r in rows)
        place = percentile / 100 * (len(values) - 1)
        low = values[math.floor(place)]
        bound = low + (place - math.floor(place)) * (values[math.ceil(place)] - low)
        rows = [r for r in rows if r["score"] >= bound]
    limits = [n for n in ({"best": 1, "top_k": objective.top_k}.get(objective.keep), objective.max_per_prompt) if n]
    found = []
    for group in {r["group"] for r in rows}:
        mine = sorted((r for r in rows if r["group"] == group), key=lambda r: (-r["score"], r["row"]))
        found += [r["row"] for r in (mine[: min(limits)] if limits else mine)]
    return sorted(found)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=5), min_size=1, max_size=5),
    st.sampled_from(["best", "top_k", "percentile", "threshold"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 1, 2]),
    st.integers(0, 50),
)
def test_what_is_kept_is_what_a_loop_keeps(
    scores: list[list[float]], keep: Any, distinct: bool, require_end: bool, limit: int | None, seed: int
) -> None:
    choices: dict[str, dict[str, Any]] = {"percentile": {"percentiles": [30.0, 60.0]}, "top_k": {"top_k": 2}}
    options = choices.get(keep, {})
    objective = RejectionSampling(keep, threshold=1.0, max_per_prompt=limit, distinct=distinct,
                                  require_end=require_end, **options)  # fmt: skip
    texts = [[2 * (i % 3) + 7 * (seed % 2) for i in range(len(row))] for row in scores]
    experience = round_of([[float(s) for s in row] for row in scores], texts, seed)
    rows = [
        {
            "row": int(experience["row"][i]),
            "group": int(experience["group"][i]),
            "score": float(experience["scores"][i]),
            "text": tuple(experience["tokens"][i][experience["loss_mask"][i]].tolist()),
            "ended": bool(experience["ended"][i]),
        }
        for i in range(experience.num_rows)
    ]
    for percentile in (30.0, 60.0, 60.0):  # round after round
        assert kept(objective, experience) == by_hand(rows, objective, percentile)


SCORES = [[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, -1.0, 4.0]]


def test_each_way_of_keeping_by_hand() -> None:
    experience = round_of(SCORES)
    assert kept(RejectionSampling(), experience) == kept(RAFT(), experience) == [1, 4]
    assert kept(RejectionSampling("top_k", top_k=2), experience) == [1, 3, 4, 5]
    assert kept(RejectionSampling("threshold", threshold=3.0), experience) == [1, 4, 5, 7]
    assert kept(RFT(threshold=3.0, max_per_prompt=2), experience) == [1, 4, 5]
    rising = RejectionSampling("percentile", percentiles=[0.0, 50.0, 100.0])
    # sorted: -1 0 1 2 3 4 5 5; the median is 2.5
    assert [kept(rising, experience) for _ in range(4)] == [[*range(8)], [1, 4, 5, 7], [4, 5], [4, 5]]


def test_penalties_move_the_choice() -> None:
    experience = round_of([[1.0, 0.9]])
    experience["ended"] = experience["row"] != 0
    assert kept(RejectionSampling(), experience) == [0]
    assert kept(RejectionSampling(missing_eos_penalty=0.5), experience) == [1]
    assert kept(RejectionSampling(require_end=True), experience) == [1]
    # row 0 has strayed by two nats
    experience["ref_logps"] = torch.zeros(2, 3)
    experience["old_logps"] = torch.where(experience["row"] == 0, 1.0, 0.0)[:, None].expand(2, 3)
    objective = RejectionSampling(kl_coef=0.1)
    assert {"old_logps", "reference"} <= objective.needs and not {"reference"} & RejectionSampling().needs
    assert kept(objective, experience) == [1]


def test_what_was_sampled_and_kept_is_measured() -> None:
    experience = RejectionSampling("top_k", top_k=2).prepare(round_of(SCORES))
    metrics = experience["metrics"]
    deviation = [torch.tensor(row).std().item() for row in SCORES]
    assert metrics["reward"] == pytest.approx(19 / 8) and metrics["reward_std"] == pytest.approx(sum(deviation) / 2)
    assert metrics["kept/share"] == 0.5 and metrics["kept/prompts"] == 1.0
    assert metrics["kept/reward"] == pytest.approx(15 / 4) and metrics["kept/lowest_score"] == 2.0


def test_nothing_good_enough_keeps_nothing() -> None:
    experience = RFT(threshold=9.0).prepare(round_of(SCORES))
    assert experience.num_rows == 0 and experience["metrics"]["kept/share"] == 0.0


@pytest.mark.parametrize("average", ["token", "row"])
def test_the_loss_is_the_likelihood_of_a_loop(average: Any) -> None:
    objective = RejectionSampling("top_k", top_k=3, average=average)
    experience = objective.prepare(round_of(SCORES))
    torch.manual_seed(0)
    logps = torch.randn(experience["tokens"].shape, dtype=torch.float64, requires_grad=True)
    loss = objective.loss(Output(logps=logps), experience)
    assert isinstance(loss.total, torch.Tensor)
    expected, count = 0.0, 0
    for row, mask in zip(logps.tolist(), experience["loss_mask"].tolist(), strict=True):
        mine = [-x for x, m in zip(row, mask, strict=True) if m]
        expected += sum(mine) if average == "token" else sum(mine) / len(mine)
        count += len(mine) if average == "token" else 1
    # float64 sums
    assert loss.total.item() == pytest.approx(expected, abs=1e-12) and objective.weight(experience).item() == count
    (gradient,) = torch.autograd.grad(loss.total, logps)
    assert not gradient[~experience["loss_mask"]].any() and gradient[experience["loss_mask"]].all()


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"keep": "worst"}, "keep is 'worst'"),
        ({"top_k": 0}, "top_k"),
        ({"max_per_prompt": 0}, "max_per_prompt"),
        ({"percentiles": [50.0]}, "keep: percentile"),
        ({"keep": "percentile", "percentiles": [50.0, 101.0]}, "0 to 100"),
        ({"keep": "percentile", "percentiles": []}, "0 to 100"),
        ({"kl_coef": -1.0}, "kl_coef"),
        ({"kl_coef": float("nan")}, "kl_coef"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty"),
        ({"keep": "threshold", "threshold": float("nan")}, "threshold"),
        ({"top_k": 3}, "top_k is for keep: top_k; with keep: best"),
        ({"average": "batch"}, "average is 'batch'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RejectionSampling(**arguments)


def test_keeping_everything_is_no_selection() -> None:
    with pytest.raises(ValueError, match=r"select nothing: raise rollout\.completions_per_prompt"):
        RejectionSampling().num_kept(8, 1)
    assert RejectionSampling("top_k", top_k=3).num_kept(8, 4) == 24
    assert RejectionSampling("threshold").num_kept(8, 4) == 32
    assert RFT(max_per_prompt=2).num_kept(8, 4) == 16


# ------------------------------------------------------------------------------------------ through the public door


def share_of_a(completions: list[str]) -> list[float]:
    """With a hundredth of something else, so that few completions are worth the same."""
    return [text.count("a") / max(len(text), 1) + 0.01 * (sum(map(ord, text)) % 97) / 97 for text in completions]


def policy(objective: RejectionSampling) -> LitPolicy:
    torch.manual_seed(0)
    return LitPolicy(
        PaLMConfig(d_model=32, num_layers=1, num_heads=2, head_dim=16, max_length=32),
        objective=objective,
        rewards=[PythonReward(share_of_a)],
        rollout=RolloutConfig(num_prompts=32, completions_per_prompt=8, passes=2, minibatch_size=16),
        sampling=Sampling(max_new_tokens=6),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
    )


def prompts(folder: Path) -> PromptData:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "abcdefgh"[i % 8]}) + "\n" for i in range(32)))
    return PromptData(train=str(path), validation=str(path), tokenizer="bytes")


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False,
                             "accelerator": "cpu", "devices": 1, "default_root_dir": folder}  # fmt: skip
    return Trainer(**{**quiet, **options})


RISING = {"keep": "percentile", "percentiles": [50.0, 80.0, 90.0]}


@pytest.mark.parametrize("arguments", [{}, RISING], ids=["best", "rising percentile"])
def test_rounds_raise_the_reward(arguments: dict[str, Any], tmp_path: Path) -> None:
    module = policy(RejectionSampling(**arguments))
    run = trainer(tmp_path, max_epochs=6, callbacks=[RolloutWriter(str(tmp_path / "rollouts"))])
    run.fit(module, datamodule=prompts(tmp_path))
    rounds = [
        [json.loads(line) for line in (tmp_path / f"rollouts/collection-{k:05d}.jsonl").read_text().splitlines()]
        for k in range(6)
    ]
    assert all(len(rows) == 256 for rows in rounds)
    share = [sum(row["kept"] for row in rows) for rows in rounds]
    if arguments:
        # equal scores at the bound are kept too, and equal completions counted once: about a half, a fifth, a tenth
        assert share[0] > share[1] > share[2]
    else:
        assert share == [32] * 6
    means = [sum(row["score"] for row in rows) / len(rows) for rows in rounds]
    assert means[-1] > 3 * means[0] and float(run.callback_metrics["val/reward"]) > 2 * means[0]


def test_rounds_go_on_where_they_stopped(tmp_path: Path) -> None:
    """Killed in the middle of the second round and resumed: the same bits, the same thresholds, the same files."""

    def rounds(folder: Path, max_steps: int, resumed: str | None = None) -> LitPolicy:
        module = policy(RejectionSampling(**RISING))
        callbacks = [LastCheckpoint(str(tmp_path / f"{folder.name}-{max_steps}")), RolloutWriter(str(folder))]
        run = trainer(tmp_path, max_steps=max_steps, callbacks=callbacks, limit_val_batches=0)
        run.fit(module, datamodule=prompts(tmp_path), ckpt_path=resumed)
        return module

    straight = rounds(tmp_path / "straight", 30)
    first = rounds(tmp_path / "parts", 20)
    assert first.objective.state_dict()["num_rounds"] == 2
    resumed = rounds(tmp_path / "parts", 30, str(tmp_path / "parts-20/last.ckpt"))
    assert resumed.objective.state_dict() == straight.objective.state_dict()
    for (name, one), (_, other) in zip(
        straight.networks.named_parameters(), resumed.networks.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    files = sorted(path.name for path in (tmp_path / "straight").iterdir())
    assert len(files) >= 2
    for name in files:
        assert (tmp_path / "straight" / name).read_text() == (tmp_path / "parts" / name).read_text(), name
