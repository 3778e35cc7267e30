"""The check that every run with rollouts makes once: before the first update the ratio is 1.

A ratio that is not 1 before anything was learned means that collecting and training compute different things: padding,
positions, temperature, precision or dropout. It is the most common silent defect of RLHF code, so it is looked for in
every run and not only in tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_palm.types import Experience

if TYPE_CHECKING:
    from lit_palm.modules.policy import LitPolicy

__all__ = ["TOLERANCE", "check_first_ratio"]

# Largest difference of a token's log-probability between two ways of batching it. float32: rounding of a forward pass,
# about 1e-6 a layer. bfloat16 keeps 8 bits: logits of size ~10 are rounded by up to 0.03, and two roundings add up.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def numeric_dtype(module: LitPolicy) -> torch.dtype:
    """The precision that the forward pass of training runs in."""
    precision = str(module.trainer.precision)
    if precision.startswith("bf16"):
        return torch.bfloat16
    if precision.startswith("16"):
        return torch.float16
    return next(module.networks.parameters()).dtype


@torch.no_grad()
def check_first_ratio(module: LitPolicy, experience: Experience, num_rows: int = 8) -> float:
    """Compare the first collection's log-probabilities with those of training, one row at a time and together.

    Args:
        module: the policy; when it starts anew, it is also compared with its reference.
        experience: a collection of all ranks, annotated, before `prepare`.
        num_rows: rows looked at: the shortest and longest, and some between.

    Returns:
        The largest difference found, in nats.

    Raises:
        RuntimeError: the ratio is not 1, or a policy that starts as its reference does not equal it.
    """
    order = experience["mask"].sum(1).argsort(stable=True)
    picked = order[torch.linspace(0, len(order) - 1, min(num_rows, len(order))).long()]
    tolerance = TOLERANCE[numeric_dtype(module)]

    def logps(rows: Tensor) -> tuple[Tensor, Experience]:
        part = experience.select(rows)
        moved = Experience({k: v.to(module.device) for k, v in part.items() if isinstance(v, Tensor)})
        with module.numerics():
            return module.policy_logps(moved).float().cpu(), part

    training = module.networks.training
    module.networks.eval()
    together, part = logps(picked)
    worst = _difference(together, part["old_logps"])
    for row in picked.tolist():
        alone, part = logps(torch.tensor([row]))
        worst = max(worst, _difference(alone, part["old_logps"]))
    module.networks.train(training)
    if not worst <= tolerance:
        raise RuntimeError(
            f"before the first update a token's log-probability differs by {worst:.2e} between collecting and training "
            f"(allowed {tolerance:.0e}): the ratio would not start at 1. The network's result depends on how rows are "
            "batched; check its masks and positions."
        )
    if "ref_logps" in experience and module.reference is None and module.trainer.global_step == 0:
        apart = _difference(experience["old_logps"], experience["ref_logps"])
        if not apart <= tolerance:
            raise RuntimeError(
                f"the policy starts as its reference, yet their log-probabilities differ by {apart:.2e} (allowed "
                f"{tolerance:.0e}): the reference is not a faithful copy"
            )
    return worst


def _difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
