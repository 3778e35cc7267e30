"""A step whose loss or gradient is not finite is not taken, by any rank; too many in a row end the run.

One NaN in one micro-batch of one rank would reach every weight through momentum, and stay. So before each optimiser
step all ranks agree on one small vector of flags (did the loss, did the gradient of each network hold a NaN or an
infinity?), and where any is set the gradients are dropped on all ranks alike: neither momentum nor weight decay moves
anything, while schedules and counters go on as for any step.

It costs a pass over the gradients, an all-reduce of a few numbers where there are several ranks, and one wait for the
device a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_palm.models.weights import local

if TYPE_CHECKING:
    from lit_palm.modules.host import LitModule
    from lit_palm.modules.spread import Networks

__all__ = ["FiniteSteps"]


class FiniteSteps:
    """Counts the steps that were skipped because something in them was not finite.

    Attributes:
        max_in_a_row: so many skipped steps in a row end the run; None: never.
        enabled: False takes every step as it comes.
        skipped: steps skipped so far, over the whole run.
        in_a_row: steps skipped since the last one that was taken.
    """

    def __init__(self, max_in_a_row: int | None = 10) -> None:
        self.max_in_a_row = max_in_a_row
        self.enabled = True
        self.skipped, self.in_a_row = 0, 0
        self._loss: Tensor | None = None

    def saw(self, loss: Tensor) -> None:
        """Take in the loss of a micro-batch, without waiting for the device."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._loss = bad if self._loss is None else self._loss | bad

    def forget(self) -> None:
        """A new step begins: its losses are still to come."""
        self._loss = None

    def taken(self, module: LitModule) -> bool:
        """Whether the step is to be taken, the same on every rank; ask once all its gradients are there.

        Args:
            module: its networks' gradients are looked at, each rank at its own part, and dropped where the step is not
                to be taken.

        Raises:
            RuntimeError: this is one skipped step in a row too many; it names step and cause.
        """
        if not self.enabled:
            return True
        flags = self._flags(module, 2.0)
        if any(flags[role] for role in module.networks):
            # a sum of squares overflows long before a value does; rarely needed, and slow on a CPU
            flags = self._flags(module, float("inf"))
        bad = [name for name, flag in flags.items() if flag]
        if not bad:
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += not _scaler_overflowed(module, flags["loss"])
            module.drop_gradients(module.networks)
            module.reset_step()
        module.log("guard/skipped_steps", float(self.skipped), batch_size=1)
        if bad and self.max_in_a_row is not None and self.in_a_row >= self.max_in_a_row:
            raise RuntimeError(
                f"step {module.trainer.global_step}: {_named(bad)} not finite, in {self.in_a_row} optimiser steps in a "
                "row, none of which was taken. Look at the data, lower the learning rate or set "
                "trainer.gradient_clip_val, and resume from a checkpoint before it; trainer.detect_anomaly finds the "
                "operation"
            )
        return not bad

    def _flags(self, module: LitModule, order: float) -> dict[str, bool]:
        """Whether the loss, and the gradient of each network, is not finite on any rank, by a norm of some order."""
        roles = list(module.networks)
        grads = (_flag(module.networks, role, module.device, order) for role in roles)
        found = module.layout.everywhere(torch.stack([self._loss_flag(module.device), *grads])).tolist()
        return dict(zip(["loss", *roles], (number > 0 for number in found), strict=True))

    def _loss_flag(self, device: torch.device) -> Tensor:
        return torch.zeros((), device=device) if self._loss is None else self._loss.to(device, torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """The counts, which go on after a restart."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting from a checkpoint."""
        self.skipped, self.in_a_row = int(state.get("skipped", 0)), int(state.get("in_a_row", 0))


def _flag(networks: Networks, role: str, device: torch.device, order: float) -> Tensor:
    """1 where the norm of this rank's part of any gradient of a network is no finite number, else 0."""
    grads = [p.grad for _, p in networks.parameters_of(role) if p.grad is not None]
    parts = [local(grad) for grad in grads]
    parts = [part for part in parts if part.numel()]  # a rank may hold nothing of a parameter that is shared out
    if not parts:
        return torch.zeros((), device=device)
    wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    norms = torch.stack([norm.to(device) for norm in torch._foreach_norm(parts, order, dtype=wide)])
    return (~torch.isfinite(norms)).any().float()


def _named(bad: list[str]) -> str:
    """ "the loss and the gradients of policy, value were", for a message."""
    roles = [name for name in bad if name != "loss"]
    words = (["the loss"] if "loss" in bad else []) + ([f"the gradient of {', '.join(roles)}"] if roles else [])
    return f"{' and '.join(words)} {'was' if len(words) == 1 else 'were'}"


def _scaler_overflowed(module: LitModule, loss_too: bool) -> bool:
    """Whether a gradient only overflowed in the scaled range of 16-mixed precision, which the scaler mends by itself.

    Its scale goes down by such a step, on every rank: one that holds no infinite gradient would keep its own scale. A
    step of this kind is skipped and counted, but in a row only once the scale is used up.
    """
    scaler = getattr(module.trainer.precision_plugin, "scaler", None)
    if scaler is None or loss_too:
        return False
    for optimizer in module.trainer.optimizers:
        for found in scaler._found_inf_per_device(optimizer).values():
            found.fill_(1.0)
    return bool(scaler.get_scale() > 1)
