"""Adafactor as PaLM used it, and learning-rate schedules by optimiser step.

Everything here is an ordinary torch optimiser or scheduler, so YAML names it by `class_path`:

    optimizer: {class_path: lit_palm.optim.Adafactor, init_args: {lr: 1.e-2}}
    scheduler: {class_path: lit_palm.optim.PaLMSchedule, init_args: {constant_steps: 10000}}

A schedule multiplies the base learning rate of each parameter group by a factor of the step alone, so it can be drawn
before the run and continued at any step. One that ends with the run may leave `max_steps` out: the host then calls
`set_total_steps` before the first step.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Adafactor", "CosineWithWarmup", "LinearWithWarmup", "PaLMSchedule", "StepSchedule", "fuse"]


class Adafactor(Optimizer):
    """Adafactor; by default the variant of PaLM (Chowdhery et al. 2022, section 5): unfactored, with momentum.

    For parameter X, gradient G and step t = 1, 2, ... (Shazeer & Stern 2018, algorithms 4 and 5):

        beta2_t = 1 - t^-0.8
        V = beta2_t V + (1 - beta2_t) (G^2 + eps1)
        U = G / sqrt(V);  U = U / max(1, RMS(U) / clip_threshold)
        M = beta1 M + (1 - beta1) lr max(eps2, RMS(X)) U
        X = X - lr^2 X - M

    The learning rate is relative: 1e-2 changes a parameter by about 1% of its root mean square. With `factored`, V of
    a matrix is the outer product of its row and column means, for memory. State is float32 also for bfloat16
    parameters. RMS is taken over each parameter as the optimiser sees it, which for parameters flattened and cut by
    FSDP1 is a rank's piece; FSDP2's sharded parameters give the RMS of the whole.

    Args:
        params: parameters or parameter groups.
        lr: relative learning rate.
        beta1: momentum of the update; None keeps none, saving a tensor a parameter.
        decay_rate: exponent of beta2_t = 1 - t^decay_rate, negative.
        eps1: added to the squared gradient.
        eps2: smallest scale of a parameter, so that parameters at zero move.
        clip_threshold: largest RMS of an update before the learning rate.
        weight_decay: None decays by lr^2 a step as PaLM did; a number by lr * weight_decay.
        scale_parameter: scale the update by the parameter's RMS.
        factored: keep row and column means of V instead of V, for parameters of two dimensions or more (the last two).

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        beta1: float | None = 0.9,
        decay_rate: float = -0.8,
        eps1: float = 1e-30,
        eps2: float = 1e-3,
        clip_threshold: float = 1.0,
        weight_decay: float | None = None,
        scale_parameter: bool = True,
        factored: bool = False,
    ) -> None:
        for name, value, fine, wanted in (
            ("lr", lr, lr >= 0, "at least 0"),
            ("beta1", beta1, beta1 is None or 0 <= beta1 < 1, "in [0, 1), or null for no momentum"),
            ("decay_rate", decay_rate, decay_rate < 0, "negative"),
            ("eps1", eps1, eps1 >= 0, "at least 0"),
            ("eps2", eps2, eps2 >= 0, "at least 0"),
            ("clip_threshold", clip_threshold, clip_threshold > 0, "positive"),
            ("weight_decay", weight_decay, weight_decay is None or weight_decay >= 0, "at least 0, or null for lr^2"),
        ):
            if not fine:
                raise ValueError(f"Adafactor: {name} is {value}; it must be {wanted}")
        defaults = {
            "lr": lr,
            "beta1": beta1,
            "decay_rate": decay_rate,
            "eps1": eps1,
            "eps2": eps2,
            "clip_threshold": clip_threshold,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "factored": factored,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step; parameters without a gradient are left alone.

        Args:
            closure: re-evaluates the loss and its gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel():
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        grad = parameter.grad
        assert grad is not None
        if grad.is_sparse:
            raise ValueError("Adafactor needs dense gradients: make the embedding with sparse=False")
        low = parameter.dtype in (torch.float16, torch.bfloat16)
        grad = grad.float() if low else grad
        value = parameter.float() if low else parameter
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
        state["step"] += 1
        update = grad * self._inverse_root(state, grad, group)
        # Scales stay tensors on the device: nothing here waits for it.
        scale = group["lr"] / (_rms(update) / group["clip_threshold"]).clamp(min=1.0)
        if group["scale_parameter"]:
            scale = scale * _rms(value).clamp(min=group["eps2"])
        update.mul_(scale)
        if group["beta1"] is not None:
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(update)
            update = state["exp_avg"].lerp_(update, 1 - group["beta1"])
        decay = group["lr"] * (group["lr"] if group["weight_decay"] is None else group["weight_decay"])
        if low:
            parameter.copy_(value.mul_(1 - decay).sub_(update))
        else:
            parameter.mul_(1 - decay).sub_(update)

    @staticmethod
    def _inverse_root(state: dict[str, Any], grad: Tensor, group: dict[str, Any]) -> Tensor:
        """Move the second moment by one step and return 1/sqrt of its estimate, shaped to multiply the gradient."""
        fresh = float(state["step"]) ** group["decay_rate"]  # 1 - beta2_t
        squared = grad.square().add_(group["eps1"])
        if not (group["factored"] and grad.dim() >= 2):
            if "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(grad)
            return state["exp_avg_sq"].lerp_(squared, fresh).rsqrt()  # type: ignore[no-any-return]
        for name, dim in (("exp_avg_sq_row", -1), ("exp_avg_sq_col", -2)):
            mean = squared.mean(dim)
            state[name] = state[name].lerp_(mean, fresh) if name in state else mean  # beta2_1 is 0
        row, column = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
        return (row / row.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * column.rsqrt().unsqueeze(-2)  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state; unlike torch's default it keeps float32 moments of bfloat16 parameters as they were."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, index in zip(group["params"], saved["params"], strict=True):
                for name, value in state_dict["state"].get(index, {}).items():
                    if name != "step" and isinstance(value, Tensor):
                        self.state[parameter][name] = value.to(device=parameter.device, copy=True)


def _rms(tensor: Tensor) -> Tensor:
    return tensor.norm() / tensor.numel() ** 0.5


def fuse(optimizer: Optimizer) -> None:
    """Let Adam or AdamW update all parameters of a device in one pass over memory, where its settings leave that open.

    `fused` or `foreach` of the configuration stay as they are. A checkpoint's own setting comes back with its state, so
    that a run that began without goes on without. Not for an optimiser whose gradients a scaler unscales.
    """
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        is_open = group["foreach"] is None and group["fused"] is None
        is_plain = not (group["capturable"] or group["differentiable"] or isinstance(group["lr"], Tensor))
        fits = all(p.is_floating_point() and p.device.type in _fused_devices() for p in group["params"])
        if is_open and is_plain and fits:
            group["fused"] = True


def _fused_devices() -> list[str]:
    """Types of devices that torch has such kernels for."""
    from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

    return list(_get_fused_kernels_supported_devices())


class StepSchedule(LRScheduler):
    """Base of the schedules: each group's base learning rate times `factor` of the optimiser step.

    A checkpoint holds the position alone; the shape and the base learning rates come from the configuration, so that a
    run continued with other settings follows those.

    Args:
        optimizer: its groups' learning rates at construction are the base.
        max_steps: optimiser steps in the run; None when the host will say so.
    """

    def __init__(self, optimizer: Optimizer, max_steps: int | None = None) -> None:
        if max_steps is not None and max_steps < 1:
            raise ValueError(f"{type(self).__name__}: max_steps is {max_steps}; it must be at least 1, or null")
        self.max_steps = max_steps
        super().__init__(optimizer)

    @abstractmethod
    def factor(self, step: int) -> float:
        """What the base learning rate is multiplied by at a step, counted from 0."""

    @property
    def needs_total_steps(self) -> bool:
        """True while the schedule waits for `set_total_steps`."""
        return False

    def set_total_steps(self, num_steps: int) -> None:
        """Say how many optimiser steps the run has; call it before the first. A `max_steps` given by the user stays.

        Raises:
            ValueError: when the number is not positive (a run without an end has no total).
        """
        if not self.needs_total_steps:
            return
        if num_steps < 1 or not math.isfinite(num_steps):
            raise ValueError(
                f"{type(self).__name__} ends with the run, and this run has no end that is known beforehand: set the "
                "schedule's max_steps, or the Trainer's"
            )
        self.max_steps = int(num_steps)

    def get_lr(self) -> list[float | Tensor]:
        """The learning rate of each group at the current step."""
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """The position of the schedule."""
        return {"last_epoch": self.last_epoch, "_step_count": self._step_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a position: the optimiser's learning rates are set to what this schedule has there."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = state_dict["_step_count"]
        for group, lr in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = lr
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class PaLMSchedule(StepSchedule):
    """Constant, then falling with the root of the step (Chowdhery et al. 2022: 1e-2 for 10k steps, then 1/sqrt(k)).

    Args:
        optimizer: its groups' learning rates are the base.
        constant_steps: steps at the base learning rate; factor sqrt(constant_steps / k) at step k after them.
    """

    def __init__(self, optimizer: Optimizer, constant_steps: int = 10000) -> None:
        if constant_steps < 1:
            raise ValueError(f"PaLMSchedule: constant_steps is {constant_steps}; it must be at least 1")
        self.constant_steps = constant_steps
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        return math.sqrt(self.constant_steps / max(step + 1, self.constant_steps))


class _WithWarmup(StepSchedule):
    """Linear warm-up from 1 / (warmup_steps + 1), so that no step is spent at zero, then `decay` to `min_ratio`."""

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, max_steps: int | None = None, min_ratio: float = 0.0
    ) -> None:
        name = type(self).__name__
        if warmup_steps < 0:
            raise ValueError(f"{name}: warmup_steps is {warmup_steps}; it must be at least 0")
        if not 0 <= min_ratio <= 1:
            raise ValueError(f"{name}: min_ratio is {min_ratio}; it must be between 0 and 1")
        self.warmup_steps = warmup_steps
        self.min_ratio = min_ratio
        super().__init__(optimizer, max_steps)

    @property
    def needs_total_steps(self) -> bool:
        return self.max_steps is None

    @abstractmethod
    def decay(self, progress: float) -> float:
        """From 1 at progress 0 to 0 at progress 1."""

    def factor(self, step: int) -> float:
        if step <= self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.max_steps is None:
            raise ValueError(f"{type(self).__name__}: max_steps is not known; set it, or run it under the Trainer")
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps))
        return self.min_ratio + (1 - self.min_ratio) * self.decay(progress)


class CosineWithWarmup(_WithWarmup):
    """Linear warm-up, then half a cosine down to `min_ratio` (Loshchilov & Hutter 2017, without restarts).

    Args:
        optimizer: its groups' learning rates are the base.
        warmup_steps: steps before the base learning rate is reached.
        max_steps: steps at whose end the lowest learning rate is reached; None: those of the run.
        min_ratio: lowest learning rate as a part of the base.
    """

    def decay(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class LinearWithWarmup(_WithWarmup):
    """Linear warm-up, then linear down to `min_ratio`.

    Args:
        optimizer: its groups' learning rates are the base.
        warmup_steps: steps before the base learning rate is reached.
        max_steps: steps at whose end the lowest learning rate is reached; None: those of the run.
        min_ratio: lowest learning rate as a part of the base.
    """

    def decay(self, progress: float) -> float:
        return 1 - progress
