"""TRL's GRPOTrainer (and others of its kind) as a function: its loss code on log-probabilities that it is given.

A trainer is made without `__init__`; what its loss reads is set by hand, and the log-probabilities come from a table
instead of a network.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_palm import Experience, Output

__all__ = ["completions", "group_trainer", "stub", "trl_loss"]


def stub(trainer_class: Any, **settings: Any) -> Any:
    """A trainer that can compute its loss and nothing else."""
    trainer = trainer_class.__new__(trainer_class)
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda x: x, reduce=lambda x, reduction="sum": x
    )
    defaults: dict[str, Any] = {
        "accelerator": accelerator,
        "model": SimpleNamespace(training=True),
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "current_gradient_accumulation_steps": 1,
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "loss_type": "grpo",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "max_completion_length": 8,
        "entropy_coef": 0.0,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
        "_metrics": {"train": defaultdict(list)},
    }
    for name, value in {**defaults, **settings}.items():
        setattr(trainer, name, value)
    return trainer


def completions(experience: Experience, values: Tensor) -> Tensor:
    """The completions' part of [B, T], moved to the left as TRL has it; zero on padding."""
    lengths = experience["loss_mask"].sum(1).tolist()
    rows = [values[b][mask] for b, mask in enumerate(experience["loss_mask"])]
    return torch.stack([torch.nn.functional.pad(r, (0, max(lengths) - n)) for r, n in zip(rows, lengths, strict=True)])


def trl_loss(trainer: Any, experience: Experience, output: Output, **inputs: Any) -> tuple[Tensor, Tensor]:
    """TRL's loss and its gradient with respect to our log-probabilities."""
    assert output.logps is not None and output.entropy is not None
    mask = completions(experience, torch.ones_like(output.logps)).long()
    logps, entropy = completions(experience, output.logps), completions(experience, output.entropy)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, entropy, None)
    given = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": experience["advantages"],
        "old_per_token_logps": completions(experience, experience["old_logps"]),
        "ref_per_token_logps": completions(experience, experience["ref_logps"]),
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(None, {**given, **inputs})
    return loss.detach(), torch.autograd.grad(loss, output.logps, retain_graph=True)[0]


def group_trainer(**settings: Any) -> Any:
    from trl.trainer.grpo_trainer import GRPOTrainer

    return stub(GRPOTrainer, **settings)
