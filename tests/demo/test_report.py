"""The report's figures against counting by hand and against the exact bootstrap distribution."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lit_palm.demo.__main__ import main
from lit_palm.demo.files import write_json, write_jsonl
from lit_palm.demo.judge import Judge
from lit_palm.demo.report import (
    build_report,
    check,
    compare,
    distinct_n,
    find_metric,
    pair_up,
    paired_bootstrap,
    pick_examples,
    summarise,
)
from lit_palm.demo.table import WIDTH, render


def rows(completions: dict[str, str], kl: float | None = 2.0) -> list[dict[str, Any]]:
    return [
        {"prompt": prompt, "completion": text, "ended": True, "num_tokens": len(text.split())}
        | ({} if kl is None else {"kl": kl})
        for prompt, text in completions.items()
    ]


def praise(texts: Sequence[str]) -> list[float]:
    """A judge one can follow by eye."""
    return [float(text.count("good") - text.count("bad")) for text in texts]


def test_bootstrap_against_all_resamples() -> None:
    """All 6^6 equally likely resamples, enumerated. Sampling 20,000 of them moves a 2.5% point by about .002 in
    probability; .006 in probability is five standard errors of .0011."""
    values = [-0.71, 0.13, 0.58, 1.37, 2.41, 0.02]
    exact = sorted(sum(draw) / 6 for draw in itertools.product(values, repeat=6))
    mean, low, high = paired_bootstrap(values, resamples=20_000)
    assert mean == pytest.approx(sum(values) / 6)

    def quantile(p: float) -> float:
        return exact[round(p * (len(exact) - 1))]

    assert quantile(0.019) <= low <= quantile(0.031)
    assert quantile(0.969) <= high <= quantile(0.981)


def test_bootstrap_of_many_is_the_normal_interval() -> None:
    """The bootstrap of a mean tends to +-1.96 standard errors; 5% of the width covers skew and 10,000 resamples."""
    generator = random.Random(0)
    values = [generator.gauss(0.5, 2) for _ in range(500)]
    mean = sum(values) / 500
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 500 / 500)
    found, low, high = paired_bootstrap(values)
    assert found == pytest.approx(mean)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.05 * 3.92 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.05 * 3.92 * error)
    assert paired_bootstrap(values) == (found, low, high)
    assert paired_bootstrap(values, seed=1)[1:] != (low, high)
    assert paired_bootstrap(values, level=0.5)[1] > low


def test_bootstrap_is_paired() -> None:
    """Prompts differ wildly, the gain is always 1: an unpaired interval would be wide."""
    start = rows({f"p{i}": " good" * (i % 7) for i in range(50)})
    after = [{**row, "completion": row["completion"] + " good"} for row in start]
    result = compare(start, after, praise)
    assert (result["gain"], result["gain_low"], result["gain_high"]) == (1.0, 1.0, 1.0)


def test_distinct_by_hand() -> None:
    # bigrams: the cat, cat sat | The cat, cat ran -> 3 different of 4
    assert distinct_n(["the cat sat", "The  cat ran"]) == 3 / 4
    assert distinct_n(["the cat sat", "the cat ran"], n=1) == 4 / 6
    assert distinct_n(["funny funny funny funny"]) == 1 / 3
    assert distinct_n(["one", ""]) == 0.0  # bigrams do not cross texts


def test_summary_by_hand() -> None:
    data = rows({"a": "good good", "b": "so bad indeed"})
    data[1] |= {"kl": 5.0, "ended": False}
    assert summarise(data, [2.0, -1.0]) == {
        "judge": 0.5, "kl": 3.5, "distinct_2": 1.0, "length": 2.5, "ended": 0.5
    }  # fmt: skip


def test_pairing_is_by_prompt_not_by_place() -> None:
    start, other = rows({"a": "1", "b": "2"}), rows({"b": "3", "a": "4"})
    assert [row["completion"] for row in pair_up(start, other, "ppo")] == ["4", "3"]
    with pytest.raises(ValueError, match="'ppo' and 'start' have different prompts, 'b'"):
        pair_up(start, other[1:], "ppo")
    with pytest.raises(ValueError, match="'ppo': the prompt 'a' appears twice"):
        pair_up(start, [*other, other[1]], "ppo")


def test_the_judge_reads_prompt_and_completion() -> None:
    start = rows({"good": " start"})
    assert compare(start, start, praise)["judge"] == 1.0


def test_find_metric() -> None:
    metrics = {"val/bits_per_byte": 2.5, "test/bits_per_byte": 2.0, "loss": 1, "accuracy": 0.7}
    assert find_metric(metrics, "bits_per_byte", "m.json") == 2.0
    assert find_metric(metrics, "accuracy", "m.json") == 0.7
    assert find_metric({"held_out/accuracy": 0.6, "not_accuracy": 1}, "accuracy", "m.json") == 0.6
    for bad in ({}, {"not_accuracy": 1.0}, {"accuracy": float("nan")}, {"accuracy": "high"}):
        with pytest.raises(ValueError, match=r"m\.json: no finite metric 'accuracy'"):
            find_metric(bad, "accuracy", "m.json")


def test_check() -> None:
    assert check("x", 2.0, high=2.0)["passed"]
    assert not check("x", 2.0001, high=2.0)["passed"]
    assert check("x", 0.8, low=0.8)["passed"]
    assert not check("x", 0.3, above=0.3)["passed"]
    assert check("x", 0.31, above=0.3)["passed"]
    assert not check("x", None, high=1.0)["passed"]
    assert not check("x", float("nan"), low=1.0)["passed"]


@pytest.fixture
def samples() -> dict[str, list[dict[str, Any]]]:
    """300 prompts; PPO adds praise and keeps everything else, the control changes nothing."""
    start = rows({f"prompt {i}": f" word{i} and more{i} of it{i}" for i in range(300)}, kl=None)
    ppo = [{**row, "completion": row["completion"] + f" good{i % 50}", "kl": 3.0} for i, row in enumerate(start)]
    return {"start": start, "ppo": ppo, "control": [{**row, "kl": 0.1} for row in start]}


METRICS = {"pretrain": 2.05, "finetune": 1.95, "reward": 0.78}


def failed(report: dict[str, Any]) -> list[str]:
    return [item["name"] for item in report["checks"] if not item["passed"]]


def test_all_targets_met(samples: dict[str, list[dict[str, Any]]]) -> None:
    report = build_report(samples, praise, METRICS, {"VADER": 0.7, "chance": 0.5})
    assert report["passed"]
    assert failed(report) == []
    assert report["num_prompts"] == 300
    assert report["systems"]["ppo"]["gain_low"] == 1.0
    assert report["systems"]["control"]["gain"] == 0.0
    assert "gain" not in report["systems"]["start"]
    assert all(set(example) == {"prompt", "start", "ppo"} for example in report["examples"])
    json.dumps(report, allow_nan=False)


def test_each_target_can_be_missed(samples: dict[str, list[dict[str, Any]]]) -> None:
    def missed(change: Any = None, metrics: dict[str, float] = METRICS, **other: Any) -> list[str]:
        changed = dict(samples)
        if change is not None:
            changed["ppo"] = [{**row, **change(row)} for row in samples["ppo"]]
        return failed(build_report({**changed, **other}, praise, metrics))

    assert missed(metrics={**METRICS, "pretrain": 2.11}) == ["bits per byte after pre-training"]
    assert missed(metrics={**METRICS, "finetune": 2.01}) == ["bits per byte after fine-tuning"]
    assert missed(metrics={**METRICS, "reward": 0.74}) == ["pair accuracy of the reward model"]
    assert missed(metrics={}) == [
        "bits per byte after pre-training", "bits per byte after fine-tuning", "pair accuracy of the reward model"
    ]  # fmt: skip
    fewer = {name: value[:255] for name, value in samples.items()}
    assert missed(**fewer) == ["held-out prompts"]
    assert missed(lambda row: {"completion": row["completion"].split(" good")[0]}) == [
        "ppo: lower end of the judge gain"
    ]
    assert missed(lambda row: {"kl": 6.1}) == ["ppo: KL to the reference, nats"]
    assert missed(lambda row: {"completion": " good good good"}) == ["ppo: distinct-2 over the start's"]
    assert missed(lambda row: {"num_tokens": 2 * row["num_tokens"]}) == ["ppo: length over the start's"]
    assert missed(lambda row: {"num_tokens": row["num_tokens"] / 2}) == ["ppo: length over the start's"]
    for praised in (" good", " bad"):
        control = [{**row, "completion": row["completion"] + praised} for row in samples["control"]]
        assert missed(control=control) == ["control: judge gain"]
    assert "grpo: KL to the reference, nats" in missed(grpo=[{**row, "kl": 9.0} for row in samples["ppo"]])


def test_bad_samples(samples: dict[str, list[dict[str, Any]]]) -> None:
    with pytest.raises(ValueError, match="'start' with at least one more"):
        build_report({"start": samples["start"]}, praise, METRICS)
    for kl in (None, float("nan"), "3"):
        with pytest.raises(ValueError, match="'ppo': column 'kl'"):
            build_report({**samples, "ppo": [{**row, "kl": kl} for row in samples["ppo"]]}, praise, METRICS)


def test_examples_do_not_depend_on_their_scores(samples: dict[str, list[dict[str, Any]]]) -> None:
    chosen = [example["prompt"] for example in pick_examples(samples, praise)]
    assert len(set(chosen)) == 5
    other = {name: list(reversed(value)) for name, value in samples.items()}
    assert [example["prompt"] for example in pick_examples(other, lambda texts: [0.0] * len(texts))] == chosen


def test_table(samples: dict[str, list[dict[str, Any]]]) -> None:
    samples["ppo"] = [
        {**row, "completion": row["completion"] + " \x1b[2J\n" * 9 + "long " * 80} for row in samples["ppo"]
    ]
    text = render(build_report(samples, praise, {"pretrain": 2.05}, {"VADER": 0.7123, "chance": 0.5}))
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "\x1b" not in text
    assert any(line.split() == ["pair", "accuracy,", "VADER", "0.712"] for line in lines)
    assert any("bits per byte after pre-training" in line and line.endswith("PASS") for line in lines)
    assert any("fine-tuning" in line and "not measured" in line and line.endswith("MISS") for line in lines)
    [header] = [line for line in lines if "95% interval" in line]
    [ppo] = [line for line in lines if line.startswith("  ppo  ") and "%" in line]
    assert ppo.index("+1.00 to +1.00") + 14 == header.index("95% interval") + 12  # right-aligned
    assert lines[-1] == "6 of 9 targets met."  # fine-tuning, reward model and distinct-2 are not


def test_report_command(
    samples: dict[str, list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rated = [{"text": f"{a} word {b}", "rating": r} for b, r in (("good0", 3), ("of it", -3)) for a in "abc"]
    Judge.fit(rated).save(tmp_path / "judge.safetensors")
    write_json(tmp_path / "judge.json", {"judge": 0.8, "vader": 0.7})
    arguments = ["report", "--judge", str(tmp_path / "judge.safetensors"), "--output", str(tmp_path / "report.json")]
    arguments.append("--samples")
    for name, data in samples.items():
        write_jsonl(tmp_path / f"{name}.jsonl", data)
        arguments.append(f"{name}={tmp_path / name}.jsonl")
    write_json(tmp_path / "lm.json", {"test/bits_per_byte": 1.9})
    metrics = ["--metrics", f"pretrain={tmp_path}/lm.json", f"finetune={tmp_path}/lm.json"]
    assert main([*arguments, *metrics]) == 0
    assert main([*arguments, *metrics, "--strict"]) == 1  # the reward model was not measured
    out = capsys.readouterr().out
    assert "pair accuracy, VADER" in out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["language_model"] == {"pretrain": 1.9, "finetune": 1.9}
    assert report["reward_model"] == {"reward model": None, "judge": 0.8, "VADER": 0.7, "chance": 0.5}
    assert list(report["systems"]) == ["start", "ppo", "control"]
    assert main([*arguments, "--metrics", f"rewards={tmp_path}/lm.json"]) == 1
    assert "unknown stages ['rewards']" in capsys.readouterr().err
    (tmp_path / "ppo.jsonl").write_text('{"prompt": "a", "completion": "b", "ended": true, "num_tokens": true}\n')
    assert main([*arguments, *metrics]) == 1
    assert "ppo.jsonl:1: column 'num_tokens' has the wrong type bool" in capsys.readouterr().err
