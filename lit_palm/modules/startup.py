"""The check that every run with rollouts makes once: before the first update the ratio is 1.

A ratio that is not 1 before anything was learned means that sampling, collecting and training compute different
things: padding, positions, temperature, precision or dropout. It is the most common silent defect of RLHF code, so it
is looked for in every run and not only in tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.rollout.engine import CachedEngine
from lit_palm.types import Experience

if TYPE_CHECKING:
    from lit_palm.modules.policy import LitPolicy

__all__ = ["ENGINE_TOLERANCE", "TOLERANCE", "check_first_ratio", "choose_logps"]

ENGINE_TOLERANCE = 1e-5
"""Nats a token within which `rollout.old_logps: auto` takes the engine's log-probabilities for those of training."""

# Largest and mean difference of a token's log-probability between two ways of computing it. Rounding of a forward pass
# in float32 is 1e-6 to 1e-5 (measured 5e-6 at most over 2,500 tokens of networks of 4 and 12 layers). bfloat16 keeps 8
# bits: logits of size 10 are off by up to 0.03 each, and single tokens by more (measured 0.11 at most, 0.009 on
# average), so there the mean is what tells rounding from a defect. float64 is bounded by its float32 log-probabilities.
# int8 is that of an engine's weights, which keep 7 bits of each row's largest.
TOLERANCE = {
    torch.float64: (1e-5, 1e-5),
    torch.float32: (1e-4, 1e-4),
    torch.float16: (0.1, 0.004),
    torch.bfloat16: (0.5, 0.03),
    torch.int8: (1.0, 0.06),
}


def numeric_dtype(module: LitPolicy) -> torch.dtype:
    """The precision that the forward pass of training runs in."""
    precision = str(module.trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    if precision.startswith("16"):
        return torch.float16
    if module.lora is not None and module.lora.quantize is not None:
        return torch.bfloat16  # kernels of quantised matrices round to 16 bits, and not alike for any number of rows
    return next(module.networks.parameters()).dtype


@torch.no_grad()
def check_first_ratio(module: LitPolicy, experience: Experience, num_rows: int = 8) -> float:
    """Compare the first collection's log-probabilities with those of training, one row at a time and together.

    Args:
        module: the policy; when it starts anew, it is also compared with its reference.
        experience: a collection of all ranks, annotated, before `prepare`; with the engine's own log-probabilities
            in `engine_logps` [B, T].
        num_rows: rows looked at: the shortest and longest, and some between.

    Returns:
        The largest difference found, in nats.

    Raises:
        RuntimeError: the engine samples from another distribution, the ratio is not 1, or a policy that starts as its
            reference does not equal it.
    """
    order = experience["mask"].sum(1).argsort(stable=True)
    picked = order[torch.linspace(0, len(order) - 1, min(num_rows, len(order))).long()]
    dtype = numeric_dtype(module)

    def logps(rows: Tensor) -> tuple[Tensor, Experience]:
        part = experience.select(rows)
        with module.numerics():
            return module.policy_logps(part.to(module.device)).float().cpu(), part

    worst = 0.0
    training = module.networks.training
    module.networks.eval()
    for rows in (picked, *picked[:, None]):
        found, part = logps(rows)
        worst = max(
            worst,
            _compare(
                found,
                part["old_logps"],
                part["loss_mask"],
                dtype,
                "between collecting and training: the ratio would not start at 1. The network's result depends on how "
                "rows are batched; check its masks and positions",
            ),
        )
    module.networks.train(training)
    if "engine_logps" in experience:
        # an engine of another make has kernels and perhaps a precision of its own
        loosest = torch.bfloat16
        if isinstance(module.engine, CachedEngine | ContinuousEngine):
            loosest = {None: dtype, "bf16": torch.bfloat16, "int8": torch.int8}[module.engine.weights]
        _compare(
            experience["engine_logps"],
            experience["old_logps"],
            experience["loss_mask"],
            loosest,
            "between sampling and training: completions come from another distribution than the one that is optimised. "
            "Check the engine's temperature, and the network's positions and mask when it decodes from its cache",
        )
    if "ref_logps" in experience and module.starts_as_reference:
        _compare(
            experience["old_logps"],
            experience["ref_logps"],
            experience["loss_mask"],
            dtype,
            "between the policy and the reference that it starts as: the reference is not a faithful copy",
        )
    return worst


def choose_logps(module: LitPolicy, experience: Experience) -> float:
    """Settle for `rollout.old_logps: auto` whose log-probabilities a run takes, and say so.

    Args:
        module: the policy; `engine_agrees` is set unless the run goes on from a checkpoint, which settled it.
        experience: the first collection, as for `check_first_ratio`.

    Returns:
        The largest difference of a token's log-probability between engine and training, in nats.
    """
    apart = (experience["engine_logps"] - experience["old_logps"]).abs().max().item()
    known = module.engine_agrees
    if known is None:
        module.engine_agrees = apart <= ENGINE_TOLERANCE
    if module.rollout.old_logps == "auto":
        assert module.rollouts is not None
        taken = "the engine's own" if module.rollouts.trusts_engine else "those of a forward pass of training"
        if module.rollouts.one_step:
            taken = "those of the one step that a collection is learned from in"
        why = "within" if apart <= ENGINE_TOLERANCE else "beyond"
        rank_zero_info(
            f"rollout.old_logps is auto: log-probabilities of the engine and of training differ by up to {apart:.1e} "
            f"nats, {why} {ENGINE_TOLERANCE:.0e}; {taken} are taken"
            + (", as always with an engine elsewhere or ahead" if module.samples_elsewhere else "")
            + ("" if known is None else ", as the checkpoint's run did")
        )
    return apart


def _compare(one: Tensor, other: Tensor, mask: Tensor, dtype: torch.dtype, what: str) -> float:
    """The largest difference of [B, T] log-probabilities where `mask` is True.

    Raises:
        RuntimeError: it, or the mean difference, is beyond rounding.
    """
    apart = (one - other).abs()[mask]
    worst, mean = apart.max().item(), apart.mean().item()
    largest, usual = TOLERANCE[dtype]
    if not (worst <= largest and mean <= usual):
        raise RuntimeError(
            f"before the first update a token's log-probability differs by up to {worst:.2e} (mean {mean:.2e}; "
            f"allowed {largest:.0e} and {usual:.0e} in {str(dtype).removeprefix('torch.')}) {what}"
        )
    return worst
