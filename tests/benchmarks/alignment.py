"""A DPO step and a GRPO iteration beside TRL's, in one run, as ratios.

    python -m tests.benchmarks.alignment                    # a table on the terminal, and runs/alignment.json
    python -m tests.benchmarks.alignment --only dpo         # one of them
    python -m tests.benchmarks.alignment --short            # a tiny network, to see that everything runs

Both sides train with their own Trainer, on networks of one shape (d 512, 8 layers, 8 heads of 64, one key/value head,
256 ids, about 30M parameters), the same ids, no gradient checkpointing. TRL's network is transformers' Llama. They run
in turn; a ratio is the median over the pairs of runs of the medians over each run's steps, ours over TRL's.

    dpo     16 pairs of 256 + 256 ids (a prompt of 128 that both answers share, answers of 128), a frozen reference
    grpo    8 prompts of 32 ids x 4 completions of 64, one step an iteration, k3 against a frozen reference

The bounds they are held to when somebody reads the table: 0.85 and 0.80 in float32, 0.50 in bfloat16 (`--precision`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_palm import (
    ByteTokenizer,
    LitPolicy,
    PaLMConfig,
    PreferenceData,
    PromptData,
    PythonReward,
    RolloutConfig,
    Sampling,
)
from tests.benchmarks import speed


@dataclass
class Shape:
    """Sizes of one run; the defaults are the ones that figures are quoted for."""

    d_model: int = 512
    num_layers: int = 8
    num_heads: int = 8
    pairs: int = 16
    dpo_prompt: int = 128
    dpo_answer: int = 128
    prompts: int = 8
    completions: int = 4
    grpo_prompt: int = 32
    grpo_answer: int = 64
    steps: int = 3
    repeats: int = 3


SHORT = Shape(32, 2, 2, 2, 6, 4, 2, 2, 4, 6, 1, 1)
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def text(number: int, length: int) -> str:
    """Letters that depend on the number: one byte, one token each."""
    generator = torch.Generator().manual_seed(number)
    return "".join(LETTERS[i] for i in torch.randint(26, (length,), generator=generator).tolist())


def pairs(shape: Shape) -> list[dict[str, str]]:
    """Pairs of answers to a prompt they share."""
    count = shape.pairs * (shape.steps + 2)
    return [
        {
            "prompt": text(3 * i, shape.dpo_prompt),
            "chosen": text(3 * i + 1, shape.dpo_answer - 1),  # an EOS is added
            "rejected": text(3 * i + 2, shape.dpo_answer - 1),
        }
        for i in range(count)
    ]


def vowels(completions: list[str], **columns: Any) -> list[float]:
    """A reward that differs between completions and costs nothing."""
    return [sum(text.count(vowel) for vowel in "aeiou") / 8 for text in completions]


class Clock(Callback):
    """Seconds from the end of one optimiser step to that of the next."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.times.append(time.perf_counter())

    def seconds(self) -> float:
        """The median, without the first step, which warms up."""
        return statistics.median(b - a for a, b in pairwise(self.times))


# ---------------------------------------------------------------- ours


def network(shape: Shape) -> PaLMConfig:
    return PaLMConfig(
        vocab_size=ByteTokenizer().vocab_size,
        d_model=shape.d_model,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        head_dim=shape.d_model // shape.num_heads,
        max_length=512,
    )


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-6)


def fit(module: LitPolicy, data: Any, shape: Shape, precision: str, folder: Path) -> float:
    clock = Clock()
    trainer = Trainer(
        max_steps=shape.steps + 1, accelerator="cpu", devices=1, precision=precision, logger=False, callbacks=[clock],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        gradient_clip_val=1.0,
    )  # type: ignore[arg-type]  # fmt: skip
    trainer.fit(module, datamodule=data)
    return clock.seconds()


def written(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def our_dpo(shape: Shape, precision: str, folder: Path) -> float:
    from lit_palm_dpo import DPO

    torch.manual_seed(0)
    module = LitPolicy(network(shape), objective=DPO(), optimizer=adamw)
    data = PreferenceData(
        train=written(folder, pairs(shape)), batch_size=shape.pairs, tokenizer="bytes", cache_dir=str(folder)
    )
    return fit(module, data, shape, precision, folder)


def our_grpo(shape: Shape, precision: str, folder: Path) -> float:
    from lit_palm_grpo import GRPO

    torch.manual_seed(0)
    rows = shape.prompts * shape.completions
    module = LitPolicy(
        network(shape),
        objective=GRPO(),
        rewards=[PythonReward(vowels)],
        rollout=RolloutConfig(shape.prompts, shape.completions, passes=1, minibatch_size=rows),
        sampling=Sampling(max_new_tokens=shape.grpo_answer, min_new_tokens=shape.grpo_answer),
        optimizer=adamw,
    )
    prompts = [{"prompt": text(i, shape.grpo_prompt - 1)} for i in range(8 * shape.prompts)]  # a BOS is added
    data = PromptData(train=written(folder, prompts), tokenizer="bytes", cache_dir=str(folder))
    return fit(module, data, shape, precision, folder)


# ---------------------------------------------------------------- TRL


def llama(shape: Shape, folder: Path) -> Any:
    """The peer's network, by way of a folder that TRL reads the reference from."""
    from transformers import LlamaForCausalLM

    size = speed.Shape(shape.d_model, shape.num_layers, shape.num_heads, ByteTokenizer().vocab_size)
    speed.llama(size, eos_token_id=2).save_pretrained(folder / "llama")
    return LlamaForCausalLM.from_pretrained(folder / "llama", dtype=torch.float32)


def letters_tokenizer() -> Any:
    """One token a letter, for `transformers`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {letter: 4 + i for i, letter in enumerate(LETTERS)}
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), ByteTokenizer().vocab_size)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def trl_options(shape: Shape, precision: str, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": shape.steps + 1, "use_cpu": True, "bf16": precision.startswith("bf16"),
        "gradient_checkpointing": False, "learning_rate": 1e-6, "optim": "adamw_torch", "report_to": [],
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1.0, "seed": 0,
        "dataloader_pin_memory": False,
    }  # fmt: skip


def timed(trainer: Any) -> float:
    """Train, and the median seconds from step to step."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    trainer.add_callback(Steps())
    trainer.train()
    return statistics.median(b - a for a, b in pairwise(times))


def trl_dpo(shape: Shape, precision: str, folder: Path) -> float:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    options = {"per_device_train_batch_size": shape.pairs, "max_length": None}
    return timed(
        DPOTrainer(
            model=llama(shape, folder),
            args=DPOConfig(**trl_options(shape, precision, folder), **options),
            train_dataset=Dataset.from_list(pairs(shape)),
            processing_class=letters_tokenizer(),
        )
    )


def trl_grpo(shape: Shape, precision: str, folder: Path) -> float:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = shape.prompts * shape.completions
    options = {
        "per_device_train_batch_size": rows, "num_generations": shape.completions, "temperature": 1.0, "beta": 0.04,
        "max_completion_length": shape.grpo_answer, "num_iterations": 1, "loss_type": "grpo",
        "generation_kwargs": {"min_new_tokens": shape.grpo_answer},
    }  # fmt: skip
    rows_of_data = [{"prompt": text(i, shape.grpo_prompt)} for i in range(8 * shape.prompts)]
    return timed(
        GRPOTrainer(
            model=llama(shape, folder),
            reward_funcs=vowels,
            args=GRPOConfig(**trl_options(shape, precision, folder), **options),
            train_dataset=Dataset.from_list(rows_of_data),
            processing_class=letters_tokenizer(),
        )
    )


# ---------------------------------------------------------------- in turn

Job = Callable[[Shape, str, Path], float]
JOBS: dict[str, tuple[Job, Job]] = {"dpo": (our_dpo, trl_dpo), "grpo": (our_grpo, trl_grpo)}


def measure(name: str, shape: Shape, precision: str, repeats: int) -> dict[str, Any]:
    """Both sides in turn: seconds a step of each run, and the median of ours over TRL's."""
    ours, theirs = JOBS[name]
    mine, peer = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            mine.append(ours(shape, "bf16-mixed" if precision == "bf16" else "32-true", Path(folder)))
        with tempfile.TemporaryDirectory() as folder:
            peer.append(theirs(shape, precision, Path(folder)))
    ratio = statistics.median(a / b for a, b in zip(mine, peer, strict=True))
    return {"seconds": mine, "peer_seconds": peer, "ratio": ratio}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="A DPO step and a GRPO iteration beside TRL's, as ratios.")
    parser.add_argument("--only", choices=JOBS, action="append", help="measure only this one")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32", help="of both sides (default 32)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--repeats", type=int, help="runs of each side (default 3)")
    parser.add_argument("--short", action="store_true", help="a tiny network, to see that everything runs")
    parser.add_argument("--output", type=Path, default=Path("runs/alignment.json"), help="where the figures go")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    shape = SHORT if args.short else Shape()
    results: dict[str, Any] = {}
    for name in args.only or JOBS:
        result = measure(name, shape, args.precision, args.repeats or shape.repeats)
        results[name] = result
        ours, peer = statistics.median(result["seconds"]), statistics.median(result["peer_seconds"])
        print(f"{name:5s} {args.precision:5s} ours / TRL {result['ratio']:5.2f}   {ours:.2f} and {peer:.2f} s a step")
    figures = {"torch": torch.__version__, "threads": args.threads, "precision": args.precision,
               "shape": asdict(shape), "results": results}  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
