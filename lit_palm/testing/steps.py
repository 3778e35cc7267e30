"""Steps of training kept, to be put beside a formula on a plain network.

    recorder = Recorder()
    module = LitPolicy(network, objective, optimizer=Recording)
    trainer = Trainer(callbacks=[recorder], ...)
    trainer.fit(module, datamodule=data)
    [optimizer] = trainer.optimizers
    logps, leaves = plain_logps(network, optimizer.before[-1], module, recorder.batches[-1])
    expected = torch.autograd.grad(my_loss(logps), leaves)        # beside optimizer.gradients[-1]

The plain network knows none of what makes a step quick: float64, each row by itself, the softmax of all its logits.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_palm.models.base import NetworkConfig
from lit_palm.modules import LitPolicy
from lit_palm.types import Experience

__all__ = ["Recorder", "Recording", "plain_logps"]


class Recording(torch.optim.AdamW):
    """Keeps what each step starts from, and the gradient that it takes.

    Args:
        params: as of any optimiser.
        lr: learning rate.

    Attributes:
        before: of each step, the parameters in the order of the groups.
        gradients: likewise.
    """

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        self.before: list[list[Tensor]] = []
        self.gradients: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.before.append([p.detach().clone() for p in parameters])
        loss = closure()
        self.gradients.append([p.grad.detach().clone() for p in parameters])
        super().step()
        return loss


class Recorder(Callback):
    """Keeps minibatches, and what was logged with each."""

    def __init__(self) -> None:
        self.batches: list[Experience] = []
        self.logged: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Experience, index: int) -> None:
        self.batches.append(batch)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def plain_logps(
    config: NetworkConfig, weights: list[Tensor], module: LitPolicy, batch: Experience
) -> tuple[Tensor, list[Tensor]]:
    """Log-probabilities of what is learned from, by a network of some weights in float64.

    Args:
        config: of the policy's network.
        weights: a step's, as `Recording.before` has them.
        module: with one optimiser, of the policy alone.
        batch: `tokens`, `mask` and `loss_mask`, all [B, T]; padded on the right.

    Returns:
        [B, T] float64, zero outside `loss_mask`; and the weights as leaves, in the optimiser's order.
    """
    plain = config.build().double()
    [optimizer] = module.trainer.optimizers
    names = {id(p): name for name, p in module.networks["policy"].named_parameters()}
    ordered = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    own = dict(plain.named_parameters())
    with torch.no_grad():
        for name, weight in zip(ordered, weights, strict=True):
            own[name].copy_(weight)
    rows = []
    for tokens, mask, targets in zip(batch["tokens"], batch["mask"], batch["loss_mask"], strict=True):
        ids = tokens[mask][None]
        logits = plain(ids, mask=torch.ones_like(ids, dtype=torch.bool))  # the mask keeps it from causal kernels
        logps = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        whole = torch.nn.functional.pad(logps[0], (1, len(tokens) - ids.shape[1]))
        rows.append(torch.where(targets, whole, 0))
    return torch.stack(rows), [own[name] for name in ordered]
