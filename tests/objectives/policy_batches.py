"""Collections and outputs of networks made of random numbers, so that every objective is tested without a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_palm.types import Experience, Output

PROMPTS, COMPLETIONS = (3, 1, 5, 2, 4, 1), (4, 6, 1, 3, 5, 2)


def rollouts(
    prompts: Sequence[int] = PROMPTS,
    completions: Sequence[int] = COMPLETIONS,
    seed: int = 0,
    padding: int = 0,
    garbage: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> Experience:
    """An annotated collection. `padding` adds columns; `garbage` fills every per-token field outside the completions.

    Row b has random numbers of its own, so that neither padding nor the other rows change them.
    """
    width = max(p + c for p, c in zip(prompts, completions, strict=True)) + padding
    place = torch.arange(width)
    start, end = torch.tensor(prompts), torch.tensor(prompts) + torch.tensor(completions)
    mask = place < end[:, None]
    loss_mask = mask & (place >= start[:, None])
    names = ("old_logps", "ref_logps", "values")
    fields = {name: torch.full((len(prompts), width), garbage, dtype=dtype) for name in names}
    scores = torch.zeros(len(prompts), dtype=dtype)
    for b in range(len(prompts)):
        generator = torch.Generator().manual_seed(1000 * seed + b)
        numbers = torch.randn(4, completions[b], generator=generator, dtype=torch.float64).to(dtype)
        row = loss_mask[b]
        fields["old_logps"][b, row] = -1.0 - numbers[0].abs()
        fields["ref_logps"][b, row] = -1.0 - numbers[0].abs() + 0.4 * numbers[1]
        fields["values"][b, row] = numbers[2]
        scores[b] = 2 * numbers[3, 0]
    return Experience(
        tokens=torch.where(mask, 1 + place, 0),
        mask=mask,
        loss_mask=loss_mask,
        ended=torch.arange(len(prompts)) % 3 != 1,
        row=torch.arange(len(prompts)),
        group=torch.arange(len(prompts)),
        scores=scores,
        **fields,
    )


def policy_output(experience: Experience, seed: int = 7, step: float = 0.3, garbage: float = 0.0) -> Output:
    """What networks that have moved by about `step` say about a collection; leaves that record gradients."""
    mask, dtype = experience["loss_mask"], experience["old_logps"].dtype

    def moved(base: Tensor, scale: float, salt: int) -> Tensor:
        values = torch.full(base.shape, garbage, dtype=dtype)
        for b, row in enumerate(mask):
            generator = torch.Generator().manual_seed(1000 * seed + 10 * int(experience["row"][b]) + salt)
            noise = torch.randn(int(row.sum()), generator=generator, dtype=torch.float64).to(dtype)
            values[b, row] = base[b, row] + scale * noise
        return values.requires_grad_()

    return Output(
        logps=moved(experience["old_logps"], step, 1),
        values=moved(experience["values"], step, 2),
        entropy=moved(torch.full_like(experience["values"], 2.0), 0.5, 3),
    )
