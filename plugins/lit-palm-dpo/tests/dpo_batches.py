"""Random batches for the tests: ragged answers, rankings with ties, rows that fill up, rubbish outside the mask."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_palm import Experience, Output

RUBBISH = float("nan")


def masks(num_rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`mask` and `loss_mask` [B, T]: prompts of 1 to 3 tokens, answers of 1 to 6, padding."""
    prompt = torch.randint(1, 4, (num_rows,), generator=generator)
    answer = torch.randint(1, 7, (num_rows,), generator=generator)
    place = torch.arange(int((prompt + answer).max()) + 1)  # one column of padding for everybody
    mask = place < (prompt + answer)[:, None]
    return mask, mask & (place >= prompt[:, None])


def batch(ranks: list[list[int]], seed: int = 0, fillers: int = 1, scale: float = 1.0) -> tuple[Experience, Output]:
    """A preference batch in float64, and what a policy and a reference might give for it.

    Args:
        ranks: of the answers of each group.
        seed: of everything.
        fillers: rows without weight, each in a group of its own.
        scale: of the log-probabilities.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows = sum(map(len, ranks)) + fillers
    mask, loss_mask = masks(num_rows, generator)
    real = num_rows - fillers
    loss_mask[real:] = False
    group = [7 * g for g, answers in enumerate(ranks) for _ in answers] + [-5 - i for i in range(fillers)]
    rank = [r for answers in ranks for r in answers] + [0] * fillers
    experience = Experience(
        tokens=torch.randint(0, 9, mask.shape, generator=generator),
        mask=mask,
        loss_mask=loss_mask,
        group=torch.tensor(group),
        rank=torch.tensor(rank),
        margin=torch.rand(num_rows, generator=generator, dtype=torch.float64),
    )
    return experience, output(loss_mask, generator, scale)


def output(loss_mask: Tensor, generator: torch.Generator, scale: float = 1.0) -> Output:
    """Log-probabilities of policy (a leaf with gradient) and reference; rubbish where they mean nothing."""
    logps = -scale * torch.rand(loss_mask.shape, generator=generator, dtype=torch.float64) - 0.01
    moved = logps + scale * torch.randn(loss_mask.shape, generator=generator, dtype=torch.float64) / 2
    logps, moved = torch.where(loss_mask, logps, RUBBISH), torch.where(loss_mask, moved.clamp(max=-1e-3), RUBBISH)
    return Output(logps=logps.requires_grad_(), ref_logps=moved)


def feedback(labels: list[bool], mismatched: int, seed: int = 0, fillers: int = 1) -> tuple[Experience, Output]:
    """Unpaired feedback with so many rows that answer another prompt."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = len(labels) + mismatched + fillers
    mask, loss_mask = masks(num_rows, generator)
    if fillers:
        loss_mask[-fillers:] = False
    label = torch.tensor([*labels, *[bool(i % 2) for i in range(mismatched + fillers)]])
    experience = Experience(
        tokens=torch.randint(0, 9, mask.shape, generator=generator),
        mask=mask,
        loss_mask=loss_mask,
        group=torch.arange(num_rows),
        label=label,
        mismatched=torch.tensor([False] * len(labels) + [True] * mismatched + [False] * fillers),
    )
    return experience, output(loss_mask, generator)


def gradient(total: Tensor | dict[str, Tensor], output: Output) -> Tensor:
    """Gradient [B, T] of the sum of all terms with respect to the policy's log-probabilities."""
    assert output.logps is not None
    terms = list(total.values()) if isinstance(total, dict) else [total]
    (found,) = torch.autograd.grad(torch.stack(terms).sum(), output.logps, allow_unused=True)
    return torch.zeros_like(output.logps) if found is None else found
