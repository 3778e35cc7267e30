"""Stages with LoRA by the command line, on a tiny PaLM: what the tests of LoRA run and look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lit_palm.callbacks import LastCheckpoint
from lit_palm.cli import main
from tests.support import adamw, language_model, sentence, text_data, trainer, write_jsonl

LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0}


def base(folder: Path, **options: Any) -> Path:
    """A language model of whole weights."""
    place = folder / "base"
    run = trainer(folder, callbacks=[LastCheckpoint(str(place))], max_epochs=1)
    run.fit(language_model(optimizer=adamw, **options), datamodule=text_data(folder))
    return place / "last.ckpt"


def data_of(folder: Path) -> dict[str, Any]:
    """Data of each module by its name."""
    words = [{"prompt": sentence(i), "completion": " " + sentence(i + 3)} for i in range(12)]
    pairs = [{"prompt": sentence(i)[:9], "chosen": sentence(i + 5), "rejected": sentence(i + 2)} for i in range(12)]
    prompts = [{"prompt": sentence(i)[: 1 + i % 9]} for i in range(10)]
    files = {name: write_jsonl(folder / f"{name}.jsonl", rows)
             for name, rows in (("words", words), ("pairs", pairs), ("prompts", prompts))}  # fmt: skip
    data = {
        "LitLanguageModel": ("DemonstrationData", files["words"]),
        "LitRewardModel": ("PreferenceData", files["pairs"]),
        "LitPolicy": ("PromptData", files["prompts"]),
    }
    return {k: {"class_path": c, "init_args": {"train": f, "batch_size": 4}} for k, (c, f) in data.items()} | {
        "pairs": {"class_path": "PreferenceData", "init_args": {"train": files["pairs"], "batch_size": 4}}
    }


def configuration(folder: Path, kind: str, steps: int, data: Any = None, **model: Any) -> Path:
    """The YAML of a run that saves after every step and keeps them all."""
    arguments: dict[str, Any] = {
        "lora": dict(LORA),
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003, "weight_decay": 0.1}},
    }
    if kind == "LitPolicy" and "objective" not in model:
        objective = {"kl_target": 0.5, "kl_horizon": 20, "kl_coef": 0.1, "scale_reward": "running"}
        arguments |= {
            "objective": {"class_path": "PPO", "init_args": objective},
            "rewards": [{"class_path": "PythonReward", "init_args": {"function": "tests.support.lower_case"}}],
            "rollout": {"num_prompts": 8, "passes": 2, "minibatch_size": 4},
            "sampling": {"max_new_tokens": 8},
            "value_lr": 0.005,
        }
    saving = {"dirpath": str(folder), "every_n_steps": 1, "keep_last": 100}
    config = {
        "seed_everything": 0,
        "trainer": {
            "max_steps": steps, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "num_sanity_val_steps": 0, "gradient_clip_val": 0.5, "log_every_n_steps": 1,
            "default_root_dir": str(folder), "limit_val_batches": 0,
            "callbacks": [{"class_path": "LastCheckpoint", "init_args": saving}],
        },
        "model": {"class_path": kind, "init_args": {k: v for k, v in (arguments | model).items() if v is not None}},
        "data": data or data_of(folder.parent / "data")[kind],
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False), encoding="utf-8")
    return path


def fit(folder: Path, kind: str, *more: str, steps: int = 3, data: Any = None, **model: Any) -> Path:
    """Run a stage; its newest checkpoint."""
    assert main(["fit", "--config", str(configuration(folder, kind, steps, data, **model)), *more]) == 0
    return folder / "last.ckpt"


def learned(checkpoint: Path | str) -> dict[str, Any]:
    """All that decides how a run goes on."""
    loaded = torch.load(checkpoint, weights_only=True)
    kept = {"weights": loaded["state_dict"], "optimizer": loaded["optimizer_states"], "step": loaded["global_step"]}
    return kept | {"objective": loaded["lit_palm"]["objective"]}


def tokens() -> Tensor:
    return torch.randint(1, 255, (3, 20), generator=torch.Generator().manual_seed(4))
