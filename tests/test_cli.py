"""The command line: what a user types, and what comes back when it is wrong. In one process where that is possible."""

from __future__ import annotations

import functools
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import torch
import yaml

from lit_palm.cli import main
from lit_palm.modules import LitLanguageModel
from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.modules.weights import load_network
from lit_palm.plugins import discover
from tests.support import make_stages, same, write_jsonl

TRAINER = {
    "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False,
    "enable_progress_bar": False, "num_sanity_val_steps": 0, "max_steps": 2,
}  # fmt: skip
NETWORK = {
    "class_path": "PaLMConfig",
    "init_args": {"d_model": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "max_length": 64},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "lm.yaml": {
        "trainer": TRAINER,
        "model": {"class_path": "LitLanguageModel", "init_args": {"network": NETWORK}},
        "data": {
            "class_path": "TextData",
            "init_args": {"train": "text.jsonl", "tokenizer": "bytes", "sequence_length": 24, "batch_size": 4},
        },
    },
    "ppo.yaml": {
        "trainer": TRAINER,
        "model": {
            "class_path": "LitPolicy",
            "init_args": {
                "network": "language_model/last.ckpt",
                "objective": "PPO",
                "rewards": [{"class_path": "RewardModel", "init_args": {"checkpoint": "reward_model/last.ckpt"}}],
                "rollout": {"num_prompts": 8, "minibatch_size": 4},
                "sampling": {"max_new_tokens": 8},
            },
        },
        "data": {
            "class_path": "PromptData",
            "init_args": {"train": "prompts.jsonl", "predict": "held_prompts.jsonl", "batch_size": 4},
        },
    },
}
REWARDS = """
def nan(completions): return [float("nan")] * len(completions)
def short(completions): return [1.0]
def boom(completions): raise KeyError("answer")
def fine(completions): return [0.5 * len(text) for text in completions]
"""


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of every stage, their data, and two configurations."""
    folder = tmp_path_factory.mktemp("cli")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_PALM_CACHE", str(folder / "cache"))
        make_stages(folder)
    for name, config in CONFIGS.items():
        (folder / name).write_text(yaml.safe_dump(config))
    (folder / "my_rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture
def here(ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of one's own with all of that, as the working directory."""
    shutil.copytree(ready, tmp_path / "x")
    monkeypatch.chdir(tmp_path / "x")
    monkeypatch.setenv("LIT_PALM_CACHE", str(ready / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(tmp_path / "x"))
    # half of a parser's making is reading docstrings from source files: once is enough
    monkeypatch.setattr(docstring_parser, "parse_from_object", docstrings)
    threads, argv, environment = torch.get_num_threads(), list(sys.argv), dict(os.environ)
    torch.set_num_threads(1)
    yield tmp_path / "x"
    sys.modules.pop("my_rewards", None)
    torch.set_num_threads(threads)
    sys.argv[:] = argv
    for name in os.environ.keys() - environment.keys():  # Lightning exports the seed
        del os.environ[name]
    discover.cache_clear()


docstrings = functools.cache(docstring_parser.parse_from_object)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lit_palm(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """lit_palm("fit", ...) -> (exit status, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main(list(arguments))
        except SystemExit as exit:
            status = int(exit.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def wrong(run: Run, *arguments: str) -> str:
    """The one line that a mistake leaves."""
    status, _, err = run(*arguments)
    assert status == 2, err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("lit-palm: error: ")]
    assert len(lines) == 1 and err.rstrip().endswith(lines[0]), f"one line, the last one: {err}"
    return lines[0].removeprefix("lit-palm: error: ")


# ------------------------------------------------------------------------------------------ configuration


def printed(run: Run, *arguments: str) -> dict[str, Any]:
    status, out, err = run(*arguments, "--print_config")
    assert status == 0, err
    return yaml.safe_load(out)


def test_print_config_shows_every_value_and_reads_back(lit_palm: Run, here: Path) -> None:
    config = printed(lit_palm, "fit", "--config", "ppo.yaml")
    ppo = config["model"]["init_args"]["objective"]
    assert ppo["class_path"].endswith("PPO") and ppo["init_args"]["kl_coef"] == 0.05
    assert config["model"]["init_args"]["rollout"]["passes"] == 2, "defaults are there too"
    (here / "again.yaml").write_text(yaml.safe_dump(config))
    assert printed(lit_palm, "fit", "--config", "again.yaml") == config


def test_later_files_win_and_lists_are_replaced_or_appended_to(lit_palm: Run, here: Path) -> None:
    callback = {"class_path": "lit_palm.callbacks.MetricsFile", "init_args": {"path": "a.json"}}
    other = {"class_path": "lit_palm.callbacks.MetricsFile", "init_args": {"path": "b.json"}}
    (here / "one.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 7, "callbacks": [callback]}}))
    (here / "two.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 9, "callbacks+": [other]}}))
    base = ("fit", "--config", "lm.yaml", "--config", "one.yaml", "--config", "two.yaml")
    config = printed(lit_palm, *base)
    assert config["trainer"]["max_steps"] == 9
    assert [c["init_args"]["path"] for c in config["trainer"]["callbacks"]] == ["a.json", "b.json"]
    assert printed(lit_palm, *base, "--trainer.max_steps", "3")["trainer"]["max_steps"] == 3, "flags win over files"
    replaced = printed(lit_palm, *base, "--config", "one.yaml")
    assert [c["init_args"]["path"] for c in replaced["trainer"]["callbacks"]] == ["a.json"]


def test_environment_variables_come_before_files_and_flags(lit_palm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PALM_FIT__TRAINER__MAX_EPOCHS", "5")
    monkeypatch.setenv("LIT_PALM_FIT__TRAINER__MAX_STEPS", "11")
    config = printed(lit_palm, "fit", "--config", "lm.yaml")
    assert config["trainer"]["max_epochs"] == 5
    assert config["trainer"]["max_steps"] == 2, "the file names it, and files win over the environment"
    assert printed(lit_palm, "fit", "--config", "lm.yaml", "--trainer.max_epochs", "6")["trainer"]["max_epochs"] == 6
    monkeypatch.setenv("LIT_PALM_FIT__CONFIG", "lm.yaml")
    assert printed(lit_palm, "fit")["model"]["class_path"].endswith("LitLanguageModel")


def test_classes_have_short_names_and_arguments_of_their_own(lit_palm: Run) -> None:
    """In a process of its own: where a test has imported bitsandbytes, AdamW is the name of two optimisers."""
    shown = program(
        "fit", "--config", "lm.yaml", "--model.objective", "LanguageModeling", "--model.objective.z_loss",
        "1e-4", "--model.optimizer", "AdamW", "--model.optimizer.lr", "0.02", "--model.scheduler",
        "CosineWithWarmup", "--model.scheduler.warmup_steps", "3", "--model.network.d_model", "32", "--print_config",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    config = yaml.safe_load(shown.stdout)["model"]["init_args"]
    assert config["objective"]["init_args"] == {"z_loss": 1e-4}
    assert config["optimizer"]["class_path"] == "torch.optim.AdamW" and config["optimizer"]["init_args"]["lr"] == 0.02
    assert config["scheduler"]["init_args"]["warmup_steps"] == 3
    assert config["network"]["init_args"]["d_model"] == 32 and config["network"]["init_args"]["num_layers"] == 1


def test_the_arguments_of_an_objective_are_explained(lit_palm: Run) -> None:
    status, out, _ = lit_palm("fit", "--model", "LitPolicy", "--model.objective.help", "PPO")
    assert status == 0
    assert "--objective.kl_coef" in out and "the price of one nat of divergence" in out


def test_help_names_all_verbs(lit_palm: Run) -> None:
    status, out, _ = lit_palm("--help")
    assert status == 0
    for verb in ("fit", "validate", "test", "predict", "generate", "export", "plugins"):
        assert re.search(rf"^ +{verb} ", out, re.MULTILINE), verb


# ------------------------------------------------------------------------------------------ runs


def test_the_same_command_gives_the_same_weights(lit_palm: Run, here: Path) -> None:
    for name in ("one", "two"):
        status, _, err = lit_palm(
            "fit", "--config", "lm.yaml", "--trainer.enable_checkpointing", "true",
            "--trainer.callbacks+=lit_palm.callbacks.LastCheckpoint", f"--trainer.callbacks.dirpath={name}",
        )  # fmt: skip
        assert status == 0, err
    same(read_checkpoint("one/last.ckpt").state_dict, read_checkpoint("two/last.ckpt").state_dict)


def test_flags_and_files_win_over_the_checkpoint(lit_palm: Run, here: Path) -> None:
    """What a resumed run does with another learning rate: it follows the configuration."""
    saving = ("--trainer.enable_checkpointing", "true", "--trainer.callbacks+=lit_palm.callbacks.LastCheckpoint")
    optimizer = ("--model.optimizer", "torch.optim.SGD", "--model.scheduler", "LinearWithWarmup",
                 "--model.scheduler.max_steps", "100")  # fmt: skip
    status, _, err = lit_palm("fit", "--config", "lm.yaml", *optimizer, "--model.optimizer.lr=0.5", *saving,
                              "--trainer.callbacks.dirpath=first")  # fmt: skip
    assert status == 0, err
    status, _, err = lit_palm(
        "fit", "--config", "lm.yaml", *optimizer, "--model.optimizer.lr=0.25", "--model.network.dropout=0.1", *saving,
        "--trainer.callbacks.dirpath=second", "--trainer.max_steps=4", "--ckpt_path", "first/last.ckpt",
    )  # fmt: skip
    assert status == 0, err
    there = torch.load("second/last.ckpt", weights_only=True)
    assert there["global_step"] == 4
    assert there["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(0.25 * 0.96)
    assert there["lit_palm"]["networks"]["policy"]["init_args"]["dropout"] == 0.1


def test_one_command_a_stage_takes_over_network_and_tokeniser(lit_palm: Run, here: Path) -> None:
    """PPO names a checkpoint of each stage before it, and no tokeniser."""
    status, _, err = lit_palm(
        "fit", "--config", "ppo.yaml", "--trainer.enable_checkpointing", "true",
        "--trainer.callbacks+=lit_palm.callbacks.LastCheckpoint", "--trainer.callbacks.dirpath=ppo",
        "--trainer.callbacks+=lit_palm.callbacks.MetricsFile", "--trainer.callbacks.path=metrics.json",
    )  # fmt: skip
    assert status == 0, err
    before, after = read_checkpoint("language_model/last.ckpt"), read_checkpoint("ppo/last.ckpt")
    assert after.header["tokenizer"] == before.header["tokenizer"]
    assert json.loads((here / "metrics.json").read_text())["step"] == 2


def test_validation_test_and_prediction(lit_palm: Run, here: Path) -> None:
    held = ("--data.validation", "held_prompts.jsonl", "--data.test", "held_prompts.jsonl")
    for verb, prefix in (("validate", "val"), ("test", "test")):
        status, out, err = lit_palm(verb, "--config", "ppo.yaml", *held)
        assert status == 0 and f"{prefix}/reward" in out, err
    status, _, err = lit_palm(
        "predict", "--config", "ppo.yaml", "--trainer.callbacks+=lit_palm.callbacks.PredictionWriter",
        "--trainer.callbacks.path=predictions.jsonl",
    )  # fmt: skip
    assert status == 0, err
    rows = [json.loads(line) for line in (here / "predictions.jsonl").read_text().splitlines()]
    prompts = [json.loads(line)["prompt"] for line in (here / "held_prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert all(row["rewards"].keys() == {"reward_model"} and row["num_tokens"] <= 8 for row in rows)


# ------------------------------------------------------------------------------------------ the other verbs

CHECKPOINT = ("--checkpoint", "policy/last.ckpt", "--max_new_tokens", "12")


def test_streaming_prints_what_is_printed_at_once(lit_palm: Run, here: Path) -> None:
    # a fresh network writes bytes that are no UTF-8, and breaks off in the middle of characters
    for seed in range(6):
        status, streamed, _ = lit_palm("generate", *CHECKPOINT, "--seed", str(seed), "--prompt", "the cat")
        assert status == 0
        _, together, _ = lit_palm("generate", *CHECKPOINT, "--seed", str(seed), "--prompt", "the cat", "a")
        assert together.startswith(streamed) and len(streamed) > len("the cat\n")
        lit_palm("generate", *CHECKPOINT, "--seed", str(seed), "--prompt", "the cat", "--output", "o.jsonl")
        (row,) = (json.loads(line) for line in (here / "o.jsonl").read_text().splitlines())
        assert streamed == row["prompt"] + row["completion"] + "\n"


def test_generate_reads_files_and_writes_jsonl(lit_palm: Run, here: Path) -> None:
    (here / "prompts.txt").write_text("the cat\n\n  a\n", encoding="utf-8")
    for name, prompts in (("prompts.txt", ["the cat", "  a"]), ("held_prompts.jsonl", None)):
        status, out, err = lit_palm("generate", *CHECKPOINT, "--file", name, "--output", "new/folder/out.jsonl")
        assert status == 0 and out == "" and "new/folder/out.jsonl" in err
        rows = [json.loads(line) for line in (here / "new/folder/out.jsonl").read_text().splitlines()]
        if prompts is None:
            prompts = [json.loads(line)["prompt"] for line in (here / name).read_text().splitlines()]
        assert [row["prompt"] for row in rows] == prompts
        assert {row["finish_reason"] for row in rows} <= {"eos", "stop", "length"}


def test_engines_take_narrower_weights_from_yaml_and_command_lines(
    lit_palm: Run, here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (here / "engine.yaml").write_text(
        "model:\n  engine:\n    class_path: ContinuousEngine\n"
        "    init_args: {max_batch_size: 3, weights: bf16, compile: false}\n"
    )
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        status, _, err = lit_palm("fit", "--config", "ppo.yaml", "--config", "engine.yaml")
    assert status == 0, err
    assert "those of a forward pass of training are taken" in caplog.text
    status, narrow, err = lit_palm(
        "generate", *CHECKPOINT, "--prompt", "the cat", "a", "--temperature", "0", "--weights", "bf16"
    )
    assert status == 0 and narrow.startswith("the cat"), err
    status, _, err = lit_palm("generate", *CHECKPOINT, "--prompt", "the cat", "--weights", "fp4")
    assert status != 0 and "weights" in err and "int8" in err


def test_generate_stops_at_stop_texts(lit_palm: Run, here: Path) -> None:
    free = lit_palm("generate", *CHECKPOINT, "--prompt", "the", "--temperature", "0")[1]
    completion = free.removeprefix("the").rstrip("\n")
    stop = next(c for c in completion if c.isascii() and c.isprintable())
    status, out, _ = lit_palm(
        "generate", *CHECKPOINT, "--prompt", "the", "--temperature", "0", "--stop", json.dumps([stop])
    )
    assert status == 0 and out == "the" + completion[: completion.index(stop) + 1] + "\n"


def test_generate_uses_the_template_that_the_checkpoint_brings(lit_palm: Run, here: Path) -> None:
    greedy = ("--temperature", "0")
    # the template of the test's tokeniser writes [role]content
    _, chat, _ = lit_palm("generate", *CHECKPOINT, *greedy, "--prompt", "the", "--chat", "true")
    _, plain, _ = lit_palm("generate", *CHECKPOINT, *greedy, "--prompt", "[user]the")
    assert chat.removeprefix("the") == plain.removeprefix("[user]the")


def test_export(lit_palm: Run, here: Path) -> None:
    status, _, err = lit_palm("export", "policy/last.ckpt", "exported", "--format", "lit-palm")
    assert status == 0, err
    names = sorted(p.name for p in (here / "exported").iterdir())
    assert names == ["config.json", "policy.safetensors", "value.safetensors"]
    same(load_network("exported").state_dict(), load_network("policy/last.ckpt").state_dict())
    status, _, err = lit_palm("fit", "--config", "ppo.yaml", "--model.network", "exported")
    assert status == 0, err


def test_plugins_as_json(lit_palm: Run) -> None:
    status, out, _ = lit_palm("plugins", "--json")
    assert status == 0
    names = {row["name"] for row in json.loads(out)}
    assert {"LanguageModeling", "RewardRanking", "PPO", "RewardModel", "PaLMConfig", "CachedEngine"} <= names


# ------------------------------------------------------------------------------------------ what is wrong


def bad_files() -> None:
    write_jsonl(Path("column.jsonl"), [{"prompt": "x"}, {"text": "x"}])
    Path("broken.jsonl").write_text('{"prompt": "x"}\nnot json\n')
    Path("empty.jsonl").write_text("")
    write_jsonl(Path("long.jsonl"), [{"prompt": "x"}, {"prompt": "x" * 100}])
    write_jsonl(Path("single.jsonl"), [{"prompt": "x", "completions": ["a"], "ranks": [0]}])
    write_jsonl(Path("ids.jsonl"), [{"tokens": [1]}, {"tokens": [999]}])
    Path("pickle.ckpt").write_bytes(pickle.dumps({"model": print}))
    Path("cut.ckpt").write_bytes(Path("policy/last.ckpt").read_bytes()[:5000])
    checkpoint = torch.load("language_model/last.ckpt", weights_only=True)
    checkpoint["lit_palm"]["format"] = 99
    torch.save(checkpoint, "other_format.ckpt")


REWARD = ("--model.rewards+=PythonReward", "--model.rewards.function")


@pytest.mark.parametrize(
    "arguments, message",
    [
        # data
        ("ppo.yaml --data.train nowhere.jsonl", r"nowhere\.jsonl: there is no such file"),
        ("ppo.yaml --data.train empty.jsonl", r"empty\.jsonl: there are no rows in it"),
        ("ppo.yaml --data.train broken.jsonl", r"broken\.jsonl:2: this line is not JSON"),
        ("ppo.yaml --data.train column.jsonl", r"column\.jsonl:2: column 'prompt' is missing"),
        ("ppo.yaml --data.train long.jsonl", r"long\.jsonl:2: this prompt has 101 tokens"),
        ("lm.yaml --model LitRewardModel --data PreferenceData --data.train single.jsonl --data.tokenizer bytes",
         r"single\.jsonl:1: a ranking needs at least two answers"),
        ("lm.yaml --data.train ids.jsonl", r"ids\.jsonl:2: the token id 999 is outside the vocabulary"),
        ("lm.yaml --model.network.vocab_size 50", "vocab_size is 50: a token id would be outside the vocabulary"),
        ("lm.yaml --data.sequence_length 65", r"data\.sequence_length is 65, but the network's context is 64"),
        # checkpoints
        ("lm.yaml --model.network nowhere.ckpt", r"'nowhere\.ckpt' does not exist"),
        ("lm.yaml --model.network pickle.ckpt", r"pickle\.ckpt: not a safe checkpoint"),
        ("lm.yaml --model.network cut.ckpt", r"cut\.ckpt: not a safe checkpoint"),
        ("lm.yaml --model.network lm.yaml", r"lm\.yaml: not a safe checkpoint"),
        ("lm.yaml --model.network other_format.ckpt", r"other_format\.ckpt: checkpoint format 99"),
        ("lm.yaml --model.network reward_model/last.ckpt", "holds reward, none of which can be used as policy"),
        ("lm.yaml --model.network language_model/last.ckpt --data.tokenizer BPETokenizer",
         "another tokenizer than the one the network was trained with"),
        ("lm.yaml --ckpt_path nowhere.ckpt", r"'nowhere\.ckpt' does not exist"),
        ("lm.yaml --ckpt_path pickle.ckpt", r"pickle\.ckpt: not a safe checkpoint"),
        ("lm.yaml --ckpt_path cut.ckpt", r"cut\.ckpt: not a safe checkpoint"),
        ("lm.yaml --ckpt_path other_format.ckpt", r"other_format\.ckpt: checkpoint format 99"),
        ("lm.yaml --ckpt_path policy/last.ckpt", "written by a policy module, this is a language_model one"),
        ("ppo.yaml --model.rewards.checkpoint language_model/last.ckpt", "none of which can be used as reward"),
        # plugins and classes
        ("lm.yaml --model.objective DPOO", r"model\.objective: unknown objective 'DPOO'.*installed: .*PPO"),
        ("lm.yaml --model.objective PPP", "did you mean PPO"),
        ("lm.yaml --model.objective PPO", "'language_model'; PPO is of kind 'policy': use LitPolicy"),
        ("lm.yaml --model.optimizer Adamm", r"model\.optimizer: nothing here is called 'Adamm'"),
        ("lm.yaml --model.optimizer lit_palm.optim.Adafactor --model.optimizer.lr fast",
         r"model\.optimizer\.lr: .*float"),
        ("lm.yaml --model.network.d_modell 3", r"model\.network: Option 'd_modell' is not accepted"),
        ("lm.yaml --model.network.d_model 0", r"d_model is 0: set it to at least 1"),
        # rewards
        ("ppo.yaml REWARD my_rewards.nan", "reward 'nan' returned nan for completion 0"),
        ("ppo.yaml REWARD my_rewards.short", "reward 'short' returned 1 values; it must return"),
        ("ppo.yaml REWARD my_rewards.boom", "reward 'boom' raised KeyError: 'answer'"),
        ("ppo.yaml REWARD my_rewards.nothing", "'my_rewards.nothing' cannot be imported"),
        # flags
        ("lm.yaml --trainer.maximum 3", "unrecognized arguments: --trainer.maximum"),
        ("lm.yaml --trainer.max_steps three", r"trainer\.max_steps: .*int.*three"),
        ("lm.yaml --trainer.accumulate_grad_batches 0", r"trainer\.accumulate_grad_batches is 0: use at least 1"),
        ("lm.yaml --trainer.accelerator abacus", "accelerator='abacus'"),
        ("lm.yaml --trainer.enable_checkpointing=false --trainer.callbacks+=lit_palm.callbacks.LastCheckpoint "
         "--trainer.callbacks.dirpath=x", "enable_checkpointing=False"),
        ("ppo.yaml --trainer.overfit_batches 1", r"trainer\.overfit_batches repeats batches"),
        ("ppo.yaml --trainer.reload_dataloaders_every_n_epochs 1", r"trainer\.reload_dataloaders_every_n_epochs"),
        ("ppo.yaml --model.sampling.max_new_tokens 0", r"sampling\.max_new_tokens is 0: use at least 1"),
        ("ppo.yaml --model.sampling.max_new_tokens 64", "prompt 0 has .* tokens, with 64 new ones more than"),
        ("ppo.yaml --model.rollout.minibatch_size 3", r"8 rows .*, which rollout\.minibatch_size 3 does not divide"),
        ("ppo.yaml --model.rollout.passes 0", r"rollout\.passes must be at least 1"),
        ("ppo.yaml --model.objective.clip 0", "clip must be positive, got 0"),
        ("nowhere.yaml", r"config: File does not exist: .*nowhere\.yaml"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_training(arguments: str, message: str, lit_palm: Run) -> None:
    bad_files()
    words = [part for word in arguments.split() for part in (REWARD if word == "REWARD" else [word])]
    assert re.search(message, wrong(lit_palm, "fit", "--config", *words))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "required: checkpoint"),
        ("--checkpoint policy/last.ckpt", "name either --prompt or --file"),
        ("--checkpoint policy/last.ckpt --prompt a --file b", "name either --prompt or --file"),
        ("--checkpoint policy/last.ckpt --file nowhere.txt", r"--file nowhere\.txt: No such file"),
        ("--checkpoint policy/last.ckpt --file empty.jsonl", r"--file empty\.jsonl: holds no prompts"),
        ("--checkpoint policy/last.ckpt --file broken.jsonl", r"broken\.jsonl:2: not a JSON object"),
        ("--checkpoint policy/last.ckpt --file ids.jsonl", r"ids\.jsonl:1: not a JSON object with a `prompt`"),
        ("--checkpoint policy/last.ckpt --prompt a --max_new_tokens 0", r"max_new_tokens is 0: use at least 1"),
        ("--checkpoint policy/last.ckpt --prompt a --max_new_tokens many", r"max_new_tokens.*int.*many"),
        ("--checkpoint policy/last.ckpt --prompt a --top_p 2", r"top_p is 2"),
        ("--checkpoint policy/last.ckpt --prompt a --max_new_tokens 64", r"more than the network's max_length \(64\)"),
        ("--checkpoint reward_model/last.ckpt --prompt a", "holds reward, none of which"),
        ("--checkpoint pickle.ckpt --prompt a", r"pickle\.ckpt: not a safe checkpoint"),
        ("--checkpoint nowhere.ckpt --prompt a", "does not exist"),
    ],
)  # fmt: skip
def test_a_mistake_in_generate_is_one_line(arguments: str, message: str, lit_palm: Run) -> None:
    bad_files()
    assert re.search(message, wrong(lit_palm, "generate", *arguments.split()))


def test_other_mistakes(lit_palm: Run) -> None:
    assert "required: fit.data, fit.model" in wrong(lit_palm, "fit")
    assert "invalid choice: 'frobnicate'" in wrong(lit_palm, "frobnicate")
    assert "required: checkpoint, folder" in wrong(lit_palm, "export")
    assert "does not exist" in wrong(lit_palm, "export", "nowhere.ckpt", "folder")
    assert "data.test is not set" in wrong(lit_palm, "test", "--config", "ppo.yaml")


def test_a_defect_of_ours_keeps_its_traceback(lit_palm: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was raised for the user is shortened; LIT_PALM_TRACEBACK=1 shows where that was, too."""

    def broken(*arguments: Any) -> None:
        raise KeyError("surprise")

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="surprise"):
        patch.setattr(LitLanguageModel, "training_step", broken)
        lit_palm("fit", "--config", "lm.yaml")
    monkeypatch.setenv("LIT_PALM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no such file"):
        lit_palm("fit", "--config", "lm.yaml", "--data.train", "nowhere.jsonl")


PICKY = """
from lit_palm import PPO

class Picky(PPO):
    API_VERSION = 1
    def __init__(self, beta: float = 0.1, sober: bool = True) -> None:
        super().__init__()
        if beta < 0:
            raise ValueError(f"beta must not be negative, got {beta}")
        self.sober = sober
    def num_kept(self, num_prompts: int, completions: int) -> int:
        if not self.sober:
            return int("many")
        raise ValueError(f"rollout.completions_per_prompt is {completions}: use 2 or more")
"""


def test_what_a_class_of_another_package_refuses_is_one_line_that_names_it(
    lit_palm: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "picky.py").write_text(PICKY)
    monkeypatch.syspath_prepend(str(here))
    objective = ("fit", "--config", "ppo.yaml", "--model.objective", "picky.Picky")
    try:
        assert wrong(lit_palm, *objective, "--model.objective.beta=-1").startswith("Picky: beta must not be negative")
        assert wrong(lit_palm, *objective).startswith("Picky: rollout.completions_per_prompt is 1: use 2")
        message = wrong(lit_palm, *objective, "--model.objective.betta=1")
        assert "Option 'betta' is not accepted; did you mean beta? Picky takes beta, sober" in message
        message = wrong(lit_palm, *objective[:3], "--model.objective=pickle_y.Picky")
        assert re.search(r"model\.objective: pickle_y\.Picky cannot be imported .*PYTHONPATH$", message)
        with pytest.raises(ValueError, match="invalid literal"):  # a slip, which is for its author
            lit_palm(*objective, "--model.objective.sober=false")
    finally:
        sys.modules.pop("picky", None)


def test_choices_are_named_once(lit_palm: Run) -> None:
    message = wrong(lit_palm, "fit", "--config", "ppo.yaml", "--model.objective.scale_reward=sometimes")
    assert re.search(r"model\.objective\.scale_reward: Expected one of 'none', .*\. Got value: sometimes$", message)


# ------------------------------------------------------------------------------------------ as a program


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lit_palm", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_two_processes_from_the_command_line(here: Path) -> None:
    """Lightning starts the second process by running the command again."""
    done = program("fit", "--config", "ppo.yaml", "--trainer.devices", "2", "--trainer.strategy", "ddp",
                   "--trainer.callbacks+=lit_palm.callbacks.MetricsFile",
                   "--trainer.callbacks.path=m.json")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((here / "m.json").read_text())["step"] == 2


def test_a_mistake_as_a_program(here: Path) -> None:
    done = program("fit", "--config", "ppo.yaml", "--data.train", "nowhere.jsonl")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == "lit-palm: error: nowhere.jsonl: there is no such file"
