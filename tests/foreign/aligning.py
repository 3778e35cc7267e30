"""Three steps of a stage on a Hugging Face folder by the command line: at once, and in two sittings."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from lit_palm import load_network, read_checkpoint
from lit_palm.cli import main
from tests.support import sentence, write_jsonl

TRAINER = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=0",
]
ROLLOUTS = [
    "--model.rewards+=PythonReward",
    "--model.rewards.init_args.function=tests.support.lower_case",
    "--model.rollout.num_prompts=8",
    "--model.rollout.minibatch_size=4",
    "--model.rollout.passes=1",
    "--model.sampling.max_new_tokens=6",
]


def write_data(folder: Path) -> Path:
    """Demonstrations, pairs and prompts."""
    write_jsonl(
        folder / "demonstrations.jsonl",
        [{"prompt": sentence(i), "completion": " " + sentence(i + 3)} for i in range(12)],
    )
    pairs = [(sentence(i), f" {sentence(i + 3)}", f" {sentence(i + 5)}") for i in range(12)]
    write_jsonl(folder / "pairs.jsonl", [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in pairs])
    write_jsonl(folder / "prompts.jsonl", [{"prompt": sentence(i)[: 1 + i % 9]} for i in range(12)])
    return folder


def arguments(stage: str, network: Path, data: Path, batch: int = 4) -> list[str]:
    """What names the stage's module, network, objective and data."""
    pairs = ["--data=PreferenceData", f"--data.train={data / 'pairs.jsonl'}", f"--data.batch_size={batch}"]
    prompts = ["--data=PromptData", f"--data.train={data / 'prompts.jsonl'}", *ROLLOUTS]
    demonstrations = ["--data=DemonstrationData", f"--data.train={data / 'demonstrations.jsonl'}"]
    named = f"--model.network={network}"
    own = {
        "sft": ["--model=LitLanguageModel", *demonstrations, f"--data.batch_size={batch}"],
        "reward": ["--model=LitRewardModel", *pairs],
        "ppo": ["--model=LitPolicy", *prompts],
        "dpo": ["--model=LitPolicy", "--model.objective=DPO", *pairs],
        "grpo": ["--model=LitPolicy", "--model.objective=GRPO", "--model.rollout.completions_per_prompt=2", *prompts],
    }
    return [*own[stage], named, *TRAINER]


def keep(folder: Path, steps: int = 3) -> list[str]:
    """Options that keep the checkpoints of the second and the last step."""
    kept = ["--trainer.callbacks+=LastCheckpoint", f"--trainer.callbacks.dirpath={folder}"]
    kept += ["--trainer.callbacks.every_n_steps=2", "--trainer.callbacks.keep_last=2"]
    return [*kept, f"--trainer.max_steps={steps}", f"--trainer.default_root_dir={folder}"]


def second(folder: Path) -> Path:
    """The checkpoint of the second step."""
    return folder / "step-00000002.ckpt"


def train(stage: str, network: Path, data: Path, folder: Path, *more: str) -> Path:
    """Three steps of a stage; the checkpoint."""
    command = ["fit", *arguments(stage, network, data), "--trainer.devices=1", *keep(folder), *more]
    assert main(command) == 0
    return folder / "last.ckpt"


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return read_checkpoint(checkpoint).state_dict


def check_stage(stage: str, network: Path, data: Path, folder: Path) -> Path:
    """Three steps move nearly all weights, and in two sittings give the same bits; the checkpoint."""
    whole = train(stage, network, data, folder / "whole")
    resumed = train(stage, network, data, folder / "resumed", f"--ckpt_path={second(folder / 'whole')}")
    ours, theirs = weights(whole), weights(resumed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    prefix = "networks.reward.trunk." if stage == "reward" else "networks.policy."
    start = {name.replace("networks.policy.", prefix, 1): w for name, w in weights(network).items()}
    still = [name for name, weight in start.items() if name in ours and torch.equal(weight, ours[name])]
    assert len(still) < len(start) / 4, still
    return whole


@torch.no_grad()
def check_export(checkpoint: Path, folder: Path, role: str) -> None:
    """What is exported for `transformers` computes there, and read back here, what the checkpoint does."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    assert main(["export", str(checkpoint), str(folder)]) == 0
    ids = torch.randint(5, 320, (2, 20), generator=torch.Generator().manual_seed(2))
    ours, back = (load_network(path, role).eval()(ids) for path in (checkpoint, folder))
    assert torch.equal(ours, back)
    if role == "policy":
        assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits, ours)
    elif json.loads((folder / "config.json").read_text())["model_type"] != "cohere":  # which has no classifier there
        classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        scores = classifier(ids).logits[:, 0] + getattr(classifier.config, "lit_palm", {})["score_bias"]
        assert (scores - ours[:, -1]).abs().max() < 1e-5  # the scale is folded into the weights
