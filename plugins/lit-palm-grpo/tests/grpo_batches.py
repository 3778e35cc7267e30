"""Collections and outputs made of random numbers: the objectives are tested without a network."""

from __future__ import annotations

from typing import Any

import torch
from slow_grpo import Row
from torch import Tensor

from lit_palm import Experience, Objective, Output

__all__ = ["COMPLETIONS", "GROUPS", "as_rows", "cut", "loss_and_gradient", "mean_of", "policy_output", "rollouts"]

# nine completions of three prompts, interleaved, two to four each
GROUPS = (7, 3, 7, 5, 3, 5, 5, 3, 5)
PROMPTS = (3, 1, 5, 2, 4, 1, 2, 6, 1)
COMPLETIONS = (4, 6, 1, 3, 5, 2, 7, 3, 4)


def rollouts(
    groups: tuple[int, ...] = GROUPS,
    completions: tuple[int, ...] = COMPLETIONS,
    padding: int = 0,
    garbage: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Experience:
    """An annotated collection; `garbage` fills per-token fields outside the completions, `padding` adds columns."""
    prompts = PROMPTS[: len(completions)]
    width = max(p + c for p, c in zip(prompts, completions, strict=True)) + padding
    place = torch.arange(width)
    start, length = torch.tensor(prompts), torch.tensor(completions)
    mask = place < (start + length)[:, None]
    loss_mask = mask & (place >= start[:, None])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, int(length.sum()), generator=generator, dtype=torch.float64).to(dtype)
    fields = {
        name: torch.full(mask.shape, garbage, dtype=dtype) for name in ("old_logps", "ref_logps", "rollout_logps")
    }
    fields["old_logps"][loss_mask] = -1 - noise[0].abs()
    fields["ref_logps"][loss_mask] = -1 - noise[0].abs() + 0.4 * noise[1]
    fields["rollout_logps"][loss_mask] = -1 - noise[0].abs() + 0.5 * noise[2]
    return Experience(
        tokens=torch.where(mask, 1 + place, 0),
        mask=mask,
        loss_mask=loss_mask,
        ended=torch.arange(len(prompts)) % 3 != 1,
        row=torch.arange(len(prompts)),
        group=torch.tensor(groups),
        scores=2 * noise[3, : len(prompts)],
        **fields,
    )


def policy_output(experience: Experience, step: float = 0.3, garbage: float = 0.0, seed: int = 7) -> Output:
    """What a policy says that has moved by about `step`; leaves that record gradients."""
    mask, old = experience["loss_mask"], experience["old_logps"]
    noise = torch.randn(2, int(mask.sum()), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logps, entropy = torch.full_like(old, garbage), torch.full_like(old, garbage)
    logps[mask] = old[mask] + step * noise[0].to(old.dtype)
    entropy[mask] = 2 + 0.5 * noise[1].to(old.dtype)
    return Output(logps=logps.requires_grad_(), entropy=entropy.requires_grad_())


def cut(output: Output, rows: Tensor, width: int) -> Output:
    """The output's part for some rows, cut to a width; the graph stays."""
    assert output.logps is not None
    entropy = output.entropy[rows, :width] if output.entropy is not None else None
    return Output(logps=output.logps[rows, :width], entropy=entropy)


def as_rows(experience: Experience, logps: Tensor) -> list[Row]:
    """The completions as lists of their own tokens."""
    rows = []
    for b, mask in enumerate(experience["loss_mask"].tolist()):
        places = [t for t, counts in enumerate(mask) if counts]

        def tokens(values: Tensor, b: int = b, places: list[int] = places) -> list[Tensor]:
            return [values[b, t] for t in places]

        rows.append(
            Row(
                new=tokens(logps),
                old=tokens(experience["old_logps"]),
                ref=tokens(experience["ref_logps"]),
                reward=experience["scores"][b].item(),
                prompt=int(experience["group"][b]),
            )
        )
    return rows


def loss_and_gradient(objective: Objective, experience: Experience, output: Output) -> tuple[Tensor, Tensor]:
    """The loss as the host averages it, and its gradient with respect to the log-probabilities."""
    assert output.logps is not None
    total, weight = objective.loss(output, experience).total, objective.weight(experience)
    assert isinstance(total, Tensor) and isinstance(weight, Tensor)
    (gradient,) = torch.autograd.grad(total / weight, output.logps, retain_graph=True)
    return (total / weight).detach(), gradient


def mean_of(metrics: dict[str, Any], name: str) -> float:
    value, count = metrics[name]
    return value.item() / count.item()
