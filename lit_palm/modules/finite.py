"""A step whose loss or gradient is not finite is not taken, by any rank; too many in a row end the run.

One NaN in one micro-batch of one rank would reach every weight through momentum, and stay. So before each optimiser
step all ranks agree on one small vector of flags (did the loss, did the gradient of each network hold a NaN or an
infinity?), and where any is set the gradients are dropped on all ranks alike: neither momentum nor weight decay moves
anything, while schedules and counters go on as for any step.

It costs a pass over the gradients, and an all-reduce of a few numbers where there are several ranks. Fused Adam and
AdamW, the default, are told on the device to leave the step out, and the host reads the counts where it logs: every
`log_every_n_steps`, where a run of too many ends. Other optimisers, and a gradient scaler, wait for the device once a
step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_palm.models.weights import local

if TYPE_CHECKING:
    from lit_palm.modules.host import LitModule
    from lit_palm.modules.spread import Networks

__all__ = ["FiniteSteps", "leave_out"]


class FiniteSteps:
    """Counts the steps that were skipped because something in them was not finite.

    Attributes:
        max_in_a_row: so many skipped steps in a row end the run; None: never.
        enabled: False takes every step as it comes.
    """

    def __init__(self, max_in_a_row: int | None = 10) -> None:
        self.max_in_a_row = max_in_a_row
        self.enabled = True
        self._counts = torch.zeros(2, dtype=torch.long)  # skipped, in a row; on the device once there are any
        self._loss: Tensor | None = None

    @property
    def skipped(self) -> int:
        """Steps skipped so far, over the whole run; reading it waits for the device."""
        return int(self._counts[0])

    @property
    def in_a_row(self) -> int:
        """Steps skipped since the last one that was taken; reading it waits for the device."""
        return int(self._counts[1])

    @property
    def spoilt(self) -> bool:
        """Whether the step under way is one to skip; reading it waits for the device."""
        return self.enabled and self.in_a_row > 0

    def saw(self, loss: Tensor) -> None:
        """Take in the loss of a micro-batch, without waiting for the device."""
        bad = ~torch.isfinite(loss.detach()).all()
        self._loss = bad if self._loss is None else self._loss | bad

    def forget(self) -> None:
        """A new step begins: its losses are still to come."""
        self._loss = None

    def taken(self, module: LitModule, optimizer: Optimizer) -> bool:
        """Whether the step is to be taken, as far as the host knows, the same on every rank; ask once all its
        gradients are there.

        Args:
            module: its networks' gradients are looked at, each rank at its own part, and dropped where the step is not
                to be taken.
            optimizer: one that leaves steps out by itself is told to, and the host knows nothing: True.

        Raises:
            RuntimeError: this is one skipped step in a row too many; it names step and cause.
        """
        alone = leaves_out(module, optimizer)
        if alone:
            optimizer.found_inf = None  # type: ignore[attr-defined]
        if not self.enabled:
            return True
        roles = list(module.networks)
        grads = (_flag(module.networks, role, module.device) for role in roles)
        flags = module.layout.everywhere(torch.stack([self._loss_flag(module.device), *grads])) > 0
        bad = counted = flags.any()
        counts = self._counts.to(module.device)
        trainer = module.trainer
        taken = alone or not bool(bad)
        looks = not alone or (trainer.global_step + 1) % max(1, trainer.log_every_n_steps) == 0  # type: ignore[attr-defined]
        if not taken and _scaler_overflowed(module, bool(flags[0])):
            counted = ~bad
        leave_out(module, optimizer, bad)
        if not taken:
            module.reset_step()
        self._counts = torch.stack([counts[0] + bad, torch.where(bad, counts[1] + counted, 0)])
        module.log("guard/skipped_steps", self._counts[0].float(), batch_size=1)
        if looks and self.max_in_a_row is not None and self.in_a_row >= self.max_in_a_row and bool(bad):
            found = [name for name, flag in zip(["loss", *roles], flags.tolist(), strict=True) if flag]
            raise RuntimeError(
                f"step {trainer.global_step}: {_named(found)} not finite, in {self.in_a_row} optimiser steps in a "
                "row, none of which was taken. Look at the data, lower the learning rate or set "
                "trainer.gradient_clip_val, and resume from a checkpoint before it; trainer.detect_anomaly finds the "
                "operation"
            )
        return taken

    def _loss_flag(self, device: torch.device) -> Tensor:
        return torch.zeros((), device=device) if self._loss is None else self._loss.to(device, torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """The counts, which go on after a restart."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting from a checkpoint."""
        self._counts = torch.tensor([int(state.get("skipped", 0)), int(state.get("in_a_row", 0))])


def leaves_out(module: LitModule, optimizer: Optimizer) -> bool:
    """Whether an optimiser can be told by a tensor of the device to leave a step out: fused Adam, without a scaler.

    It then touches neither weights nor moments nor its count of steps.
    """
    fused = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and all(g["fused"] for g in optimizer.param_groups)
    return fused and getattr(module.trainer.precision_plugin, "scaler", None) is None


def leave_out(module: LitModule, optimizer: Optimizer, flag: Tensor) -> None:
    """Leave the step that is about to be taken out where a flag is set, with momentum and weight decay.

    Args:
        module: its gradients are dropped where the optimiser must be kept from the step.
        optimizer: about to step.
        flag: scalar bool, the same on every rank.
    """
    if leaves_out(module, optimizer):
        # offloaded weights are on the host, where a flag on its way from the device would be read before it is there
        flag = flag.float().to(optimizer.param_groups[0]["params"][0].device)
        before = optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.found_inf = flag if before is None else torch.maximum(before, flag)  # type: ignore[attr-defined]
    elif bool(flag):
        module.drop_gradients(module.networks)


def _flag(networks: Networks, role: str, device: torch.device) -> Tensor:
    """1 where any of this rank's part of a network's gradients is no finite number, else 0."""
    grads = [p.grad for _, p in networks.parameters_of(role) if p.grad is not None]
    parts = [local(grad) for grad in grads]
    parts = [part for part in parts if part.numel()]  # a rank may hold nothing of a parameter that is shared out
    if not parts:
        return torch.zeros((), device=device)
    if parts[0].is_cpu:  # where the largest magnitude takes seven times as long
        ends = torch.stack([end.to(device) for part in parts for end in torch.aminmax(part)])
    else:
        ends = torch.stack([norm.to(device) for norm in torch._foreach_norm(parts, float("inf"))])
    return (~torch.isfinite(ends)).any().float()


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
