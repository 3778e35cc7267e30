"""Tiny networks, tiny data and a quiet Trainer: what the tests of the modules and of the command line share."""

from __future__ import annotations

import copy
import json
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_palm.callbacks import LastCheckpoint
from lit_palm.data import DemonstrationData, PreferenceData, PromptData, TextData
from lit_palm.data.tokenizers import ByteTokenizer
from lit_palm.models.palm import PaLMConfig
from lit_palm.modules import LitLanguageModel, LitPolicy, LitRewardModel
from lit_palm.objectives import PPO, Objective
from lit_palm.objectives.base import Need
from lit_palm.objectives.functional import logistic_loss, pairs_of_rankings
from lit_palm.rollout.collector import RolloutConfig
from lit_palm.rollout.rewards import PythonReward, RewardModel
from lit_palm.rollout.sampling import Sampling
from lit_palm.types import Experience, Loss, Output

WORDS = ["the", "cat", "sat", "on", "a", "warm", "mat", "and", "saw", "nine", "small", "birds", "fly", "over", "tall"]
WORDS += ["trees"]


def config(**changes: Any) -> PaLMConfig:
    """A network of about ten thousand parameters."""
    fields: dict[str, Any] = {"d_model": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "max_length": 64}
    return PaLMConfig(**{**fields, **changes})


def adamw(params: Any) -> torch.optim.Optimizer:
    """AdamW with weight decay, so that a group left out or a decayed frozen weight shows."""
    return torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)


def sentence(number: int) -> str:
    """A text that depends on the number, of two to seven words."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(2 + number % 6))


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def text_data(folder: Path, count: int = 24, **options: Any) -> TextData:
    """Ragged documents, packed into windows of 24 tokens; shuffled unless told otherwise."""
    source = write_jsonl(folder / "text.jsonl", [{"text": sentence(i)} for i in range(count)])
    held = write_jsonl(folder / "held.jsonl", [{"text": sentence(i)} for i in range(100, 106)])
    fields: dict[str, Any] = {"tokenizer": "bytes", "sequence_length": 24, "batch_size": 4}
    return TextData(**{"train": source, "validation": held, **fields, **options})


def demonstration_data(folder: Path, count: int = 12, **options: Any) -> DemonstrationData:
    rows = [{"prompt": sentence(i), "completion": " " + sentence(i + 3)} for i in range(count)]
    source = write_jsonl(folder / "demonstrations.jsonl", rows)
    return DemonstrationData(**{"train": source, "tokenizer": "bytes", "batch_size": 4, **options})


def ranking_data(folder: Path, count: int = 12, **options: Any) -> PreferenceData:
    """Rankings of two to four answers, some with ties; the answer with more letters `a` is better."""

    def row(number: int) -> dict[str, Any]:
        answers = [sentence(number + 5 * k) for k in range(2 + number % 3)]
        order = sorted({a.count("a") for a in answers}, reverse=True)
        ranks = [order.index(a.count("a")) for a in answers]
        return {"prompt": sentence(number)[:9], "completions": answers, "ranks": ranks}

    source = write_jsonl(folder / "rankings.jsonl", [row(i) for i in range(count)])
    held = write_jsonl(folder / "held_rankings.jsonl", [row(i) for i in range(50, 56)])
    return PreferenceData(**{"train": source, "validation": held, "tokenizer": "bytes", "batch_size": 4, **options})


def prompt_data(folder: Path, count: int = 10, **options: Any) -> PromptData:
    """Prompts of one to nine characters."""
    source = write_jsonl(folder / "prompts.jsonl", [{"prompt": sentence(i)[: 1 + i % 9]} for i in range(count)])
    held = write_jsonl(folder / "held_prompts.jsonl", [{"prompt": sentence(i)[: 1 + i % 9]} for i in range(60, 66)])
    return PromptData(**{"train": source, "validation": held, "tokenizer": "bytes", "batch_size": 4, **options})


def count_a(completions: list[str]) -> list[float]:
    """A verifiable reward: how often the completion says `a`."""
    return [float(text.count("a")) for text in completions]


def lower_case(completions: list[str]) -> list[float]:
    """A reward that differs from completion to completion, also of a network that writes any byte."""
    return [sum(c.islower() for c in text) - 0.1 * len(text) for text in completions]


def language_model(**options: Any) -> LitLanguageModel:
    torch.manual_seed(0)
    return LitLanguageModel(**{"network": config(), "optimizer": adamw, **options})


def reward_model(**options: Any) -> LitRewardModel:
    torch.manual_seed(0)
    return LitRewardModel(**{"network": config(), "optimizer": adamw, **options})


def policy(ppo: dict[str, Any] | None = None, rollout: dict[str, Any] | None = None, **options: Any) -> LitPolicy:
    """PPO with completions of one to eight tokens, several passes and every piece of state that it can carry."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "network": config(),
        "objective": PPO(
            **{
                "kl_target": 0.5,
                "kl_horizon": 20,
                "kl_coef": 0.1,
                "scale_reward": "running",
                "center_reward": True,
                "missing_eos_penalty": 0.5,
                **(ppo or {}),
            }
        ),
        "rewards": [PythonReward(lower_case), PythonReward(count_a, weight=0.5)],
        "rollout": RolloutConfig(**{"num_prompts": 8, "passes": 2, "minibatch_size": 4, **(rollout or {})}),
        # a fresh network writes any byte: about one in four of them ends a completion
        "sampling": Sampling(max_new_tokens=8, stop=list(string.ascii_uppercase + string.digits + string.punctuation)),
        "optimizer": adamw,
        "value_lr": 5e-3,
    }
    return LitPolicy(**{**fields, **options})


class Selective(Objective):
    """Rejects prompts whose answers are all worth the same, learns from the better answers only, ever fewer of them."""

    API_VERSION = 1

    def __init__(self, share: float = 0.75, reject: bool = True) -> None:
        self.share, self.reject, self.rounds = share, reject, 0

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"rollouts", "reward", "old_logps"})

    def accept(self, experience: Experience) -> Tensor | None:
        if not self.reject:
            return None
        group, scores = experience["group"], experience["scores"]
        spread = torch.stack([scores[group == g].max() - scores[group == g].min() for g in group])
        return spread > 1.5

    def prepare(self, experience: Experience) -> Experience:
        self.rounds += 1
        kept = int(experience.num_rows * self.share / self.rounds)
        return experience.select(experience["scores"].argsort(descending=True, stable=True)[:kept])

    def weight(self, experience: Experience) -> Tensor:
        return experience["loss_mask"].sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        assert output.logps is not None
        ratio = torch.where(experience["loss_mask"], output.logps - experience["old_logps"], 0).exp()
        return Loss(-torch.where(experience["loss_mask"], ratio, 0).sum())

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds = state["rounds"]


class Preference(Objective):
    """The simplest loss on pairs against a reference, with a term of its own weight beside it."""

    API_VERSION = 1
    grouped = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference"})

    def weight(self, experience: Experience) -> dict[str, Tensor]:
        better, _, _ = pairs_of_rankings(experience)
        return {"pairs": torch.tensor(len(better)), "tokens": experience["loss_mask"].sum()}

    def loss(self, output: Output, experience: Experience) -> Loss:
        assert output.logps is not None and output.ref_logps is not None
        better, worse, _ = pairs_of_rankings(experience)
        gain = (output.logps - output.ref_logps).sum(1)
        total = logistic_loss(gain[better] - gain[worse]).sum()
        count = torch.tensor(len(better))
        return Loss(
            {"pairs": total, "tokens": -0.1 * output.logps.sum()},
            {
                "gain": (gain.detach().sum(), torch.tensor(len(gain))),
                "accuracy": ((gain[better] > gain[worse]).sum(), count),
            },
        )


def preference_policy(**options: Any) -> LitPolicy:
    torch.manual_seed(0)
    return LitPolicy(**{"network": config(), "objective": Preference(), "optimizer": adamw, **options})


def selective_policy(
    share: float = 0.75, reject: bool = True, rollout: dict[str, Any] | None = None, **options: Any
) -> LitPolicy:
    """A policy whose collections differ in size and need several rounds."""
    sizes = {"num_prompts": 4, "completions_per_prompt": 4, "passes": 2, "minibatch_size": 4, "max_rounds": 3}
    objective = Selective(share, reject)
    return policy(rollout={**sizes, **(rollout or {})}, objective=objective, value_lr=None, **options)


def trainer(folder: Path | str, **options: Any) -> Trainer:
    """A Trainer on one process that prints nothing and writes nothing unless told to."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": str(folder),
        "log_every_n_steps": 1,
    }  # fmt: skip
    if not options.get("callbacks"):
        quiet["enable_checkpointing"] = False
    return Trainer(**{**quiet, **options})


def weights(module: Any) -> dict[str, Tensor]:
    """A copy of the weights, and of every buffer."""
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two sets of weights, relative to the largest weight of its tensor."""
    assert one.keys() == other.keys() and one
    return max(float((one[k] - other[k]).abs().max() / one[k].abs().max().clamp(min=1e-3)) for k in one)


def same(one: Any, other: Any, where: str = "") -> None:
    """Assert that two nested structures of tensors and plain values are equal to the last bit."""
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert isinstance(other, dict) and one.keys() == other.keys(), where
        for key in one:
            same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{where}[{place}]")
    else:
        assert one == other, f"{where}: {one!r} != {other!r}"


def everything(run: Trainer) -> dict[str, Any]:
    """All that decides how a run goes on: weights, optimiser, schedules, objective, step."""
    module: Any = run.lightning_module
    return copy.deepcopy(
        {
            "weights": weights(module),
            "optimizer": run.optimizers[0].state_dict(),
            "schedulers": [s.scheduler.state_dict() for s in run.lr_scheduler_configs],
            "objective": module.objective.state_dict(),
            "step": run.global_step,
        }
    )


@contextmanager
def recorded(module: Any) -> Iterator[list[Tensor]]:
    """The tokens of every training batch, in order."""
    seen: list[Tensor] = []
    original = module.training_step

    def step(batch: Any, batch_idx: int) -> Tensor:
        seen.append(batch["tokens"].clone())
        return original(batch, batch_idx)

    module.training_step = step
    try:
        yield seen
    finally:
        del module.training_step


def make_stages(folder: Path) -> dict[str, Path]:
    """A checkpoint of every stage, each taking network, tokeniser and template from the one before it."""
    tokenizer = ByteTokenizer(chat_template="{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    stages = {name: folder / name / "last.ckpt" for name in ("language_model", "reward_model", "policy")}
    source = str(stages["language_model"])

    def fit(name: str, module: Any, data: Any) -> None:
        run = trainer(folder, callbacks=[LastCheckpoint(str(stages[name].parent))], max_epochs=1)
        run.fit(module, datamodule=data)

    fit("language_model", language_model(), text_data(folder, tokenizer=tokenizer))
    fit("reward_model", reward_model(network=source, calibrate="whiten"), ranking_data(folder, tokenizer=None))
    rewards = [RewardModel(str(stages["reward_model"]))]
    fit("policy", policy(network=source, rewards=rewards), prompt_data(folder, tokenizer=None))
    return stages
