"""What an optimiser costs, found by taking a step of the very class on fake tensors: state and temporaries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_palm.plan.job import OptimizerCost

__all__ = ["optimizer_cost"]

SIDE, COUNT = 1024, 8


def optimizer_cost(make: Callable[[Any], torch.optim.Optimizer], weight_bytes: int) -> OptimizerCost:
    """The cost of the optimiser that `make` gives for parameters of so many bytes each.

    A step over equal square matrices is traced, one tensor at a time (as on a CPU) and, where the class leaves that
    open, with multi-tensor kernels (as torch prefers on a GPU).

    Raises:
        ValueError: the optimiser cannot take a step on fake tensors.
    """
    single = _trace(make, weight_bytes, together=False)
    name, size = single[0], SIDE * SIDE * weight_bytes
    several = _trace(make, weight_bytes, together=True)
    # what a multi-tensor step holds in excess grows with all parameters
    return OptimizerCost(
        name=name,
        state=single[1] / (COUNT * SIDE * SIDE),
        step_largest=single[2] / size,
        step_all=several[2] / (COUNT * size),
    )


def _trace(make: Callable[[Any], torch.optim.Optimizer], weight_bytes: int, together: bool) -> tuple[str, int, int]:
    """Name, bytes of state and most bytes of temporaries."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lit_palm.plan.tracker import Tracker

    dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[weight_bytes]
    tracker = Tracker()
    with FakeTensorMode(allow_non_fake_inputs=True), tracker:
        parameters = [nn.Parameter(torch.empty(SIDE, SIDE, dtype=dtype)) for _ in range(COUNT)]
        for parameter in parameters:
            parameter.grad = torch.empty_like(parameter)
        optimizer = make([{"params": parameters}])
        name = type(optimizer).__name__
        for group in optimizer.param_groups:
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = together
        try:
            optimizer.step()
            start = sum(tracker.live.values())
            tracker.peak = start
            optimizer.step()
        except Exception as error:
            raise ValueError(f"model.optimizer: {name} cannot be traced without data ({error})") from error
        state = [
            v for held in optimizer.state.values() for v in held.values() if isinstance(v, Tensor) and v.numel() > 1
        ]
        return name, sum(v.numel() * v.element_size() for v in state), tracker.peak - start
