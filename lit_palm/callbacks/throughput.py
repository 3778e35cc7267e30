"""How fast a run goes: `num_tokens`, `perf/tokens_per_s` and `perf/mfu`, every `log_every_n_steps`; then a line of it.

The module counts tokens in `pl_module.num_tokens_seen`, a number or a tensor on its device, of this rank. It is read
only when it is logged, so that no step waits for the device.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_palm.callbacks.learning_rate import is_log_step
from lit_palm.models.hardware import measure_peak_flops

__all__ = ["Throughput"]


class Throughput(Callback):
    """Log tokens seen, tokens a second and model FLOPs utilisation, summed over all ranks.

    Tokens a second are those of the steps since the last logged one, with all that training takes (data, rollouts,
    the step) and without validation. Utilisation is tokens/s x FLOPs a token / peak FLOPs of all devices (Chowdhery et
    al. 2022, appendix B). FLOPs a token are `pl_module.flops_per_token` where the module knows them, else 6 x trained
    parameters, which leaves attention out.

    Args:
        peak_flops: floating-point operations a second of one device at the run's precision, as its maker states them;
            None measures a large matrix product on the device when training starts.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"Throughput: peak_flops is {peak_flops}; it must be positive, or null to measure it")
        self.peak_flops = peak_flops
        self.num_tokens = 0
        self._counted = 0
        self._logged_step = 0
        self._window_start = 0.0
        self._window_tokens = 0
        self._start, self._start_tokens = 0.0, 0
        self._validation_start = 0.0
        self._flops_per_token = 0.0

    @staticmethod
    def replaces() -> type[Callback]:
        """A callback of this type in the configuration takes the place of the default one."""
        return Throughput

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counted = int(getattr(pl_module, "num_tokens_seen", 0))
        self._logged_step = trainer.global_step
        if self.peak_flops is None:
            self.peak_flops = measure_peak_flops(pl_module.device, _dtype(str(trainer.precision)))
        self._flops_per_token = float(getattr(pl_module, "flops_per_token", None) or 6 * _num_trained(pl_module))
        self._window_start, self._window_tokens = time.perf_counter(), self.num_tokens
        self._start, self._start_tokens = self._window_start, self.num_tokens

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how fast it went, from the first step to the last."""
        self._count(trainer, pl_module)
        seen = self.num_tokens - self._start_tokens
        if seen > 0:
            rate = seen / max(time.perf_counter() - self._start, 1e-9)
            share = f"{self._utilisation(trainer, rate):.1%} of {self.peak_flops:.3g} FLOP/s"
            rank_zero_info(f"{seen:,} tokens at {rate:,.0f} a second, {share} a device")

    def _utilisation(self, trainer: Trainer, rate: float) -> float:
        assert self.peak_flops is not None
        return rate * self._flops_per_token / (self.peak_flops * trainer.world_size)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        passed = time.perf_counter() - self._validation_start
        self._window_start += passed
        self._start += passed

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._logged_step or not is_log_step(trainer, step):
            return
        self._count(trainer, pl_module)
        now = time.perf_counter()
        rate = (self.num_tokens - self._window_tokens) / max(now - self._window_start, 1e-9)
        self._window_start, self._window_tokens, self._logged_step = now, self.num_tokens, step
        utilisation = self._utilisation(trainer, rate)
        values = {"num_tokens": float(self.num_tokens), "perf/tokens_per_s": rate, "perf/mfu": utilisation}
        pl_module.log_dict(values, batch_size=1)

    def _count(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what all ranks have seen since the last call to `num_tokens`; every rank must call it."""
        seen: int | Tensor = getattr(pl_module, "num_tokens_seen", 0)
        fresh = torch.as_tensor(seen, dtype=torch.long, device=pl_module.device) - self._counted
        own = int(fresh)
        self._counted += own
        all_sum: Any = getattr(pl_module, "all_sum", None)
        if callable(all_sum):  # counts rows once that several ranks see, as under tensor parallelism
            self.num_tokens += int(all_sum(fresh))
        else:
            self.num_tokens += own if trainer.world_size == 1 else int(trainer.strategy.reduce(fresh, reduce_op="sum"))

    def state_dict(self) -> dict[str, Any]:
        """Tokens seen by all ranks since the first step of the first run."""
        return {"num_tokens": self.num_tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting from a checkpoint."""
        self.num_tokens = int(state_dict["num_tokens"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the count up to date: `state_dict` cannot see the module, and steps may lie between two logs."""
        if trainer.state.fn == "fit" and self.state_key in checkpoint.get("callbacks", {}):
            self._count(trainer, pl_module)
            checkpoint["callbacks"][self.state_key] = self.state_dict()


def _dtype(precision: str) -> torch.dtype:
    """The type that matrix products have under a Trainer's precision."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    if precision.startswith("16"):
        return torch.float16
    return torch.float64 if precision.startswith("64") else torch.float32


def _num_trained(pl_module: LightningModule) -> int:
    return sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
