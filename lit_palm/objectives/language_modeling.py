"""Next-token prediction: pre-training and fine-tuning."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lit_palm.objectives.base import Kind, Need, Objective
from lit_palm.types import Experience, Loss, Output


class LanguageModeling(Objective):
    """Cross-entropy of the tokens in `loss_mask`, in nats, with PaLM's optional z-loss.

    Which tokens count is the data's business: all of a text, or only completions of demonstrations.

    Args:
        z_loss: coefficient of log^2 Z, which keeps the softmax normaliser near 1; PaLM used 1e-4
            (Chowdhery et al. 2022, section 5).
    """

    kind: ClassVar[Kind] = "language_model"

    def __init__(self, z_loss: float = 0.0) -> None:
        if z_loss < 0:
            raise ValueError(f"z_loss must not be negative, got {z_loss}; PaLM used 1e-4")
        self.z_loss = z_loss

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"log_z"}) if self.z_loss else frozenset()

    def weight(self, experience: Experience) -> Tensor:
        """The number of predicted tokens."""
        return experience["loss_mask"].sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        """Summed cross-entropy; metric `nll` is per token."""
        mask = experience["loss_mask"]
        assert output.logps is not None
        nll = -torch.where(mask, output.logps, 0).sum()
        count = mask.sum()
        metrics = {"nll": (nll.detach(), count)}
        total = nll
        if self.z_loss:
            assert output.log_z is not None
            z = torch.where(mask, output.log_z.square(), 0).sum()
            metrics["z_loss"] = (z.detach() * self.z_loss, count)
            total = nll + self.z_loss * z
        return Loss(total, metrics)
