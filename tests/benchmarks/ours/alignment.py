"""Our objectives that need a preference or a rollout, one optimiser step at a time."""

from __future__ import annotations

from typing import Any

import torch

from lit_palm import LitPolicy, PreferenceData, PromptData, PythonReward, RolloutConfig, Sampling
from tests.benchmarks.inputs import Size, preference_pairs, text, vowels
from tests.benchmarks.memory import Peak
from tests.benchmarks.ours.running import config, stepwise, written
from tests.benchmarks.stepping import Steps
from tests.benchmarks.worker import Work


def adamw(groups: Any) -> torch.optim.Optimizer:
    """What TRL's trainers take by default, at their learning rate."""
    return torch.optim.AdamW(groups, lr=1e-6, fused=True)


def dpo(
    size: dict[str, int], pairs: int, prompt: int, answer: int, batches: int, precision: str,
    precomputed: bool = False,
) -> Steps:  # fmt: skip
    """A step of DPO on `pairs` pairs against a frozen reference, or its log-probabilities computed in advance."""

    def build() -> tuple[Any, Any]:
        from lit_palm_dpo import DPO

        module = LitPolicy(
            config(Size(**size)), objective=DPO(), optimizer=adamw, precompute_reference=precomputed
        )  # fmt: skip
        source = written(preference_pairs(pairs * batches, prompt, answer))
        return module, PreferenceData(train=source, batch_size=pairs, tokenizer="bytes")

    return stepwise(build, precision, gradient_clip_val=1.0)


def grpo(
    size: dict[str, int], prompts: int, completions: int, prompt: int, answer: int, batches: int, precision: str
) -> Steps:
    """An iteration of GRPO: completions of `answer` tokens, k3 against a frozen reference, one step."""

    def build() -> tuple[Any, Any]:
        from lit_palm_grpo import GRPO

        module = LitPolicy(
            config(Size(**size)),
            objective=GRPO(),
            rewards=[PythonReward(vowels)],
            rollout=RolloutConfig(prompts, completions, passes=1, minibatch_size=prompts * completions),
            sampling=Sampling(max_new_tokens=answer, min_new_tokens=answer),
            optimizer=adamw,
        )
        source = written([{"prompt": text(i, prompt - 1)} for i in range(prompts * batches)])  # a BOS is added
        return module, PromptData(train=source, tokenizer="bytes")

    return stepwise(build, precision, gradient_clip_val=1.0)


def dpo_memory(**options: Any) -> Work:
    """Peak bytes of two steps of DPO, of which the second has the optimiser's state, above what the imports took."""
    import lit_palm_dpo  # noqa: F401  # its imports are no memory of the step

    peak = Peak()

    def run() -> dict[str, Any]:
        steps = dpo(**options)
        steps()
        steps()
        return {"cost": peak.bytes()}

    return run
