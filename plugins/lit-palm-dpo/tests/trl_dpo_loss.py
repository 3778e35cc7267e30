"""TRL's DPOTrainer as a function: its loss code on a stand-in for the model.

A trainer is made without its constructor and given the attributes that its loss reads. The stand-in returns the
log-probabilities that it is given.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_palm import Experience, Output

__all__ = ["Model", "stacked", "trl_dpo", "without_constructor"]


class Model:
    """Called as TRL calls a model with a fused head: log-probabilities [B, T - 1] of the tokens with a label."""

    training = True

    def __init__(self, logps: dict[int, Tensor]) -> None:
        self.logps = logps  # of a row, by its first token

    def __call__(self, input_ids: Tensor, labels: Tensor, **_: Any) -> SimpleNamespace:
        rows = torch.stack([self.logps[first] for first in input_ids[:, 0].tolist()])
        zeros = torch.zeros_like(rows[:, 1:])
        return SimpleNamespace(
            log_probs=torch.where(labels[:, 1:] != -100, rows[:, 1:], 0),
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=zeros,
        )


ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def without_constructor(trainer: type, **attributes: Any) -> Any:
    made: Any = trainer.__new__(trainer)
    shared = {"accelerator": ACCELERATOR, "aux_loss_enabled": False, "_metrics": {"train": defaultdict(list)},
              "_total_train_tokens": 0, "_tp_size": 1}  # fmt: skip
    for name, value in {**shared, **attributes}.items():
        setattr(made, name, value)
    return made


def stacked(experience: Experience, output: Output) -> tuple[list[int], dict[int, Tensor], Tensor, Tensor]:
    """Rows in TRL's order (all chosen, then all rejected), ids of which the first names the row, and the sums."""
    rank = experience["rank"]
    real = experience["loss_mask"].any(1)
    order = [*(real & (rank == 0)).nonzero().flatten().tolist(), *(rank == 1).nonzero().flatten().tolist()]
    ids = experience["tokens"].clone()
    ids[:, 0] = 100 + torch.arange(len(ids))
    assert output.logps is not None
    return order, {100 + i: output.logps[i] for i in range(len(ids))}, ids, experience["loss_mask"]


def trl_dpo(
    experience: Experience, output: Output, names: list[str], **options: Any
) -> tuple[Tensor, dict[str, float]]:
    """The loss and the metrics of TRL's DPOTrainer."""
    from trl.trainer.dpo_trainer import DPOTrainer

    order, logps, ids, mask = stacked(experience, output)
    assert output.ref_logps is not None
    reference = torch.where(mask, output.ref_logps, 0).sum(1)[order]
    model = Model(logps)
    trainer = without_constructor(
        DPOTrainer,
        model=model,
        beta=options.get("beta", 0.1),
        precompute_ref_logps=True,
        loss_types=names,
        loss_weights=options.get("loss_weights") or [1.0] * len(names),
        ld_alpha=options.get("ld_alpha"),
        f_divergence_type=options.get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=options.get("f_alpha_divergence_coef", 0.5),
        label_smoothing=options.get("label_smoothing", 0.0),
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=options.get("discopop_tau", 0.05)),
    )
    if trainer.ld_alpha is not None:  # TRL precomputes them with the same weights
        lengths = mask[order].sum(1)
        shared = torch.minimum(*lengths.chunk(2)).repeat(2)[:, None]
        place = mask[order].cumsum(1)
        factor = torch.where(place <= shared, 1.0, trainer.ld_alpha)
        reference = torch.where(mask[order], output.ref_logps[order] * factor, 0).sum(1)
    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": ids[order],
        "attention_mask": experience["mask"][order].long(),
        "completion_mask": mask[order].long(),
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    return loss, {k: v[0] for k, v in trainer._metrics["train"].items() if k != "num_tokens"}
