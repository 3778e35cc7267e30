"""TRL's trainers, one optimiser step at a time."""

from __future__ import annotations

import string
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from tests.benchmarks.inputs import Size, preference_pairs, text, vowels
from tests.benchmarks.memory import Peak
from tests.benchmarks.peers.language import llama
from tests.benchmarks.stepping import Steps
from tests.benchmarks.worker import Work


def saved_llama(size: Size, folder: str) -> Any:
    """The network, by way of a folder that TRL reads the reference from."""
    from transformers import LlamaForCausalLM

    llama(size, eos_token_id=2).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def letters_tokenizer(vocab_size: int) -> Any:
    """One token a letter, for `transformers`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: 4 + i for i, letter in enumerate(string.ascii_lowercase)}
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | letters
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), vocab_size)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def arguments(precision: str, folder: str) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": folder, "max_steps": 10_000, "use_cpu": True, "bf16": precision.startswith("bf16"),
        "gradient_checkpointing": False, "learning_rate": 1e-6, "report_to": [], "save_strategy": "no",
        "logging_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1.0, "seed": 0,
        "dataloader_pin_memory": False,
    }  # fmt: skip


def stepwise(build: Callable[[], Any]) -> Steps:
    """A trainer that goes on when it is called."""

    def loop(pause: Callable[[], None]) -> None:
        from transformers import TrainerCallback

        class Pause(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                pause()

        trainer = build()
        trainer.add_callback(Pause())
        trainer.train()

    return Steps(loop)


def dpo(
    size: dict[str, int], pairs: int, prompt: int, answer: int, batches: int, precision: str,
    precomputed: bool = False,
) -> Steps:  # fmt: skip
    """A step of DPO on `pairs` pairs against a frozen reference, or its log-probabilities computed in advance."""

    def build() -> Any:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        folder, shape = tempfile.mkdtemp(), Size(**size)
        options = {"per_device_train_batch_size": pairs, "max_length": None, "precompute_ref_log_probs": precomputed}
        return DPOTrainer(
            model=saved_llama(shape, folder),
            args=DPOConfig(**arguments(precision, folder), **options),
            train_dataset=Dataset.from_list(preference_pairs(pairs * batches, prompt, answer)),
            processing_class=letters_tokenizer(shape.vocab_size),
        )

    return stepwise(build)


def grpo(
    size: dict[str, int], prompts: int, completions: int, prompt: int, answer: int, batches: int, precision: str
) -> Steps:
    """An iteration of GRPO: completions of `answer` tokens, k3 against a frozen reference, one step."""

    def build() -> Any:
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        folder, shape = tempfile.mkdtemp(), Size(**size)
        options: dict[str, Any] = {
            "per_device_train_batch_size": prompts * completions, "num_generations": completions, "temperature": 1.0,
            "beta": 0.04, "max_completion_length": answer, "num_iterations": 1, "loss_type": "grpo",
            "generation_kwargs": {"min_new_tokens": answer},
        }  # fmt: skip
        return GRPOTrainer(
            model=saved_llama(shape, folder),
            reward_funcs=vowels,
            args=GRPOConfig(**arguments(precision, folder), **options),
            train_dataset=Dataset.from_list([{"prompt": text(i, prompt)} for i in range(prompts * batches)]),
            processing_class=letters_tokenizer(shape.vocab_size),
        )

    return stepwise(build)


def dpo_memory(**options: Any) -> Work:
    """Peak bytes of two steps of DPO, of which the second has the optimiser's state, above what the imports took."""
    import transformers.models.llama.modeling_llama  # noqa: F401
    import trl.trainer.dpo_trainer  # noqa: F401  # imports are no memory of the step

    peak = Peak()

    def run() -> dict[str, Any]:
        steps = dpo(**options)
        steps()
        steps()
        return {"cost": peak.bytes()}

    return run
