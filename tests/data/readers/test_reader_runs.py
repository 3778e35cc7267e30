"""Published data from the command line to a trained network: each stage on small files of the hub's schema."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docstring_parser
import pytest

from lit_palm.cli import main
from tests.data.readers.published import oasst

QUIET = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_model_summary=false",
         "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0"]  # fmt: skip
NETWORK = (
    "{class_path: PaLMConfig, init_args: {d_model: 48, num_layers: 2, num_heads: 2, head_dim: 24, max_length: 96}}"
)
docstrings = functools.cache(docstring_parser.parse_from_object)
Run = Callable[..., str]


@pytest.fixture
def lit_palm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """lit_palm("fit", ...) in a folder of its own -> what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(docstring_parser, "parse_from_object", docstrings)
    argv, environment = list(sys.argv), dict(os.environ)

    def run(verb: str, *flags: str) -> str:
        capsys.readouterr()
        status = main([verb, *flags, *QUIET])
        out, err = capsys.readouterr()
        assert status == 0, err
        return out + err

    yield run
    sys.argv[:] = argv
    for name in os.environ.keys() - environment.keys():  # Lightning exports the seed
        del os.environ[name]


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_ppo_on_gsm8k_is_rewarded_for_right_answers(lit_palm: Run) -> None:
    """A network that has learned nine solutions by heart is right in most of its answers, a fresh one never, and PPO
    takes its steps on the same file."""
    sums = [(a, b) for a in (1, 2, 3) for b in (2, 4, 5)]
    write("gsm8k.jsonl", [{"question": f"{a} and {b}?", "answer": f"{a}+{b} = <<{a}+{b}={a + b}>>{a + b}\n#### {a + b}"}
                          for a, b in sums])  # fmt: skip
    data = ["--data.reader=GSM8K", "--data.train=gsm8k.jsonl"]
    out = ["--trainer.callbacks=LastCheckpoint", "--trainer.callbacks.dirpath"]
    rate = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.01"]
    lit_palm("fit", "--model=LitLanguageModel", f"--model.network={NETWORK}", *rate, "--data=DemonstrationData", *data,
             "--data.tokenizer=bytes", "--data.batch_size=9", "--trainer.max_steps=120", *out, "sft")  # fmt: skip

    policy = ["--model=LitPolicy", "--model.network=sft/last.ckpt", "--model.objective=PPO",
              "--model.rewards=[{class_path: GSM8KAnswer}]", "--model.sampling.max_new_tokens=24",
              "--model.rollout.num_prompts=9", "--model.rollout.minibatch_size=9", "--data=PromptData", *data,
              "--data.validation=gsm8k.jsonl"]  # fmt: skip
    shown = lit_palm("validate", *policy, "--model.sampling.temperature=0.3")
    right = re.search(r"val/rewards/gsm8k_answer\W+([\d.]+)", shown)
    assert right and float(right[1]) > 0.6, shown
    lit_palm("fit", *policy, "--trainer.max_steps=2", *out, "ppo")
    assert Path("ppo/last.ckpt").exists()


def test_trees_fine_tune_and_train_a_reward_model(lit_palm: Run) -> None:
    """Rankings of OASST train a reward model until it ranks them as people did; its threads fine-tune."""
    rows = []
    for i in range(8):
        rows += [oasst(f"q{i}", None, f"Q{i}", tree=str(i))]
        rows += [oasst(f"{a}{i}", f"q{i}", a, rank=r, tree=str(i)) for r, a in enumerate(("good", "so", "bad"))]
    write("oasst.jsonl", rows)
    data = ["--data.reader=OASST", "--data.reader.lang=[en]", "--data.train=oasst.jsonl", "--data.tokenizer=bytes",
            "--data.validation_fraction=0.3"]  # fmt: skip
    rate = ["--model.optimizer=torch.optim.AdamW", "--model.optimizer.lr=0.003", f"--model.network={NETWORK}"]
    lit_palm("fit", "--model=LitLanguageModel", *rate, "--data=DemonstrationData", *data, "--trainer.max_steps=2")
    shown = lit_palm("fit", "--model=LitRewardModel", "--model.objective=RewardRanking", *rate, "--data=PreferenceData",
                     *data, "--trainer.max_steps=30", "--trainer.callbacks=LastCheckpoint",
                     "--trainer.callbacks.dirpath=reward")  # fmt: skip
    assert "left rows out" not in shown
    shown = lit_palm("validate", "--model=LitRewardModel", "--model.objective=RewardRanking",
                     "--model.network=reward/last.ckpt", "--data=PreferenceData", *data)  # fmt: skip
    accuracy = re.search(r"val/accuracy\W+([\d.]+)", shown)
    assert accuracy and float(accuracy[1]) == 1.0, shown
