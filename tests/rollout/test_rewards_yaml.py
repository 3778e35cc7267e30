"""Every built-in reward from YAML: what `--print_config` prints reads back, and what is built has those arguments."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lit_palm.cli import main
from lit_palm.plugins.registry import BUILTINS
from lit_palm.rollout import rewards as package
from lit_palm.rollout.rewards import Ensemble, NumericMatch, Reward, every_reward, total_reward
from tests.rollout.reward_batches import texts

REWARDS: list[dict[str, Any]] = [
    {"class_path": "RewardModel", "init_args": {"checkpoint": "reward.ckpt", "weight": 0.5}},
    {"class_path": "SequenceClassifier", "init_args": {"model": "classifier", "label": "positive", "reads": "pair"}},
    {"class_path": "PythonReward", "init_args": {"function": "math.fsum", "name": "sum"}},
    {"class_path": "RegexReward", "init_args": {"pattern": r"(?s)<b>\d+</b>", "match": 0.2, "max_count": 3}},
    {"class_path": "ExactMatch", "init_args": {"answer": "city", "ignore_case": True, "extract": "#### (.*)"}},
    {"class_path": "NumericMatch", "init_args": {"after": "####", "relative": 0.01, "weight": 2}},
    {"class_path": "GSM8KAnswer", "init_args": {"check": "published", "format_match": 0.1}},
    {"class_path": "LengthPenalty", "init_args": {"max_length": 20, "unit": "character", "cap": None}},
    {"class_path": "RepetitionPenalty", "init_args": {"n": 2, "unit": "word"}},
    {
        "class_path": "Ensemble",
        "init_args": {
            "combine": "lower_bound",
            "k": 2,
            "rewards": [
                {"class_path": "RewardModel", "init_args": {"checkpoint": "a.ckpt", "name": "a"}},
                {"class_path": "RewardModel", "init_args": {"checkpoint": "b.ckpt", "name": "b"}},
                {"class_path": "RegexReward", "init_args": {"pattern": "x", "weight": 0.1}},
            ],
        },
    },
]
docstrings = functools.cache(docstring_parser.parse_from_object)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A PPO configuration with all rewards; `lit-palm` builds everything and runs nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(docstring_parser, "parse_from_object", docstrings)
    argv, environment = list(sys.argv), dict(os.environ)
    model = {"network": "start.ckpt", "objective": "PPO", "rewards": REWARDS}
    content = {
        "trainer": {"accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        "model": {"class_path": "LitPolicy", "init_args": model},
        "data": {"class_path": "PromptData", "init_args": {"train": "prompts.jsonl"}},
    }
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(content))
    yield tmp_path / "ppo.yaml"
    sys.argv[:] = argv
    for name in os.environ.keys() - environment.keys():  # Lightning exports the seed
        del os.environ[name]


def printed(file: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["fit", "--config", str(file), "--print_config"])
    out, err = capsys.readouterr()
    assert not exit.value.code, err
    return yaml.safe_load(out)


def test_every_reward_round_trips_through_the_command_line(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = printed(config, capsys)
    there = first["model"]["init_args"]["rewards"]
    assert [r["class_path"].rpartition(".")[2] for r in there] == [r["class_path"] for r in REWARDS]
    for given, full in zip(REWARDS, there, strict=True):
        same = {k: v for k, v in given["init_args"].items() if k != "rewards"}
        assert same.items() <= full["init_args"].items() and "weight" in full["init_args"], "defaults are there too"
    again = config.with_name("again.yaml")
    again.write_text(yaml.safe_dump(first))
    assert printed(again, capsys) == first

    built: list[list[Reward]] = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: built.append(cli.model.rewards))
    assert main(["fit", "--config", str(again)]) == 0
    (rewards,) = built
    assert [type(reward).__name__ for reward in rewards] == [r["class_path"] for r in REWARDS]
    ensemble = rewards[-1]
    assert isinstance(ensemble, Ensemble) and (ensemble.combine, ensemble.k) == ("lower_bound", 2.0)
    assert ensemble.logged == ["ensemble", "ensemble/a", "ensemble/b", "ensemble/regex_reward"]
    assert isinstance(rewards[5], NumericMatch) and rewards[5].after == "####" and rewards[5].weight == 2
    assert len(list(every_reward(rewards))) == 13

    batch = texts(["<b>1</b> Rome #### 7", "so so so so"], city=["7", "b"], answer=[7, 7])
    total, values = total_reward(rewards[3:-1], batch)
    # the first is right, and 20 characters long; of three times "so so" two were said before
    assert total.tolist() == pytest.approx([0.2 + 1 + 2 + 1.1, -2 / 3], abs=1e-6)  # float32
    names = ["regex_reward", "exact_match", "numeric_match", "gsm8k_answer", "length_penalty", "repetition_penalty"]
    assert list(values) == names


def test_a_pattern_that_does_not_compile_is_one_line_with_its_key(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    rewards = "[{class_path: RegexReward, init_args: {pattern: '(a'}}]"
    assert main(["fit", "--config", str(config), "--model.rewards", rewards]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-palm: error: ")]
    assert len(lines) == 1 and "pattern of RegexReward '(a' is no regular expression: missing )" in lines[0]


def test_all_rewards_are_built_in_public_and_documented() -> None:
    import lit_palm

    names = {name for name in package.__all__ if isinstance(getattr(package, name), type)} - {"Reward", "RewardBatch"}
    assert names == set(BUILTINS["lit_palm.rewards"]) == {r["class_path"] for r in REWARDS}
    for name in names:
        cls = getattr(lit_palm, name)
        assert cls is getattr(package, name) and issubclass(cls, Reward)
        assert "Args:" in (cls.__doc__ or "") and f"`{name}`" in (package.__doc__ or "")
