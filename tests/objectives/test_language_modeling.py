"""Language modelling against torch's cross-entropy and a logsumexp in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm.objectives import LanguageModeling
from lit_palm.types import Experience, Output

# float64: the same sums in another order
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def predictions(garbage: float = 0.0) -> tuple[Tensor, Experience, Output]:
    """Logits [B, T, V], a batch with ragged masks, and what a network would say about it (a graph to the logits)."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 6, 11, generator=generator, dtype=torch.float64)).requires_grad_()
    tokens = torch.randint(11, (3, 6), generator=generator)
    loss_mask = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    log_p = logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    log_z = logits[:, :-1].logsumexp(-1)
    padded = [torch.where(loss_mask, F.pad(x, (1, 0)), garbage) for x in (log_p, log_z)]
    batch = Experience(tokens=tokens, mask=loss_mask, loss_mask=loss_mask)
    return logits, batch, Output(logps=padded[0], log_z=padded[1])


def test_loss_over_weight_is_the_cross_entropy_with_ignored_tokens() -> None:
    logits, batch, output = predictions()
    objective = LanguageModeling()
    targets = batch["tokens"][:, 1:].masked_fill(~batch["loss_mask"][:, 1:], -100)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 11), targets.reshape(-1))
    loss = objective.loss(output, batch)
    mean = loss.total / objective.weight(batch)
    torch.testing.assert_close(mean, expected, **EXACT)
    torch.testing.assert_close(torch.autograd.grad(mean, logits)[0], torch.autograd.grad(expected, logits)[0], **EXACT)
    value, count = loss.metrics["nll"]
    torch.testing.assert_close(value / count, expected.detach(), **EXACT)
    assert not value.requires_grad


def test_z_loss_adds_its_coefficient_times_the_squared_log_normaliser() -> None:
    logits, batch, output = predictions()
    plain, with_z = LanguageModeling(), LanguageModeling(z_loss=0.01)
    assert plain.needs == frozenset() and with_z.needs == {"log_z"}
    squares = [
        torch.log(torch.exp(logits[b, t - 1].detach()).sum()).item() ** 2
        for b in range(3)
        for t in range(1, 6)
        if batch["loss_mask"][b, t]
    ]
    added = with_z.loss(output, batch).total - plain.loss(output, batch).total
    assert added.item() == pytest.approx(0.01 * sum(squares), rel=1e-12)
    value, count = with_z.loss(output, batch).metrics["z_loss"]
    assert (value / count).item() == pytest.approx(0.01 * sum(squares) / len(squares), rel=1e-12)


@pytest.mark.parametrize("z_loss", [0.0, 1e-4])
def test_only_tokens_in_the_loss_mask_are_learned_from(z_loss: float) -> None:
    _, batch, clean = predictions()
    _, _, dirty = predictions(garbage=1e200)
    objective = LanguageModeling(z_loss)
    assert torch.equal(objective.loss(clean, batch).total, objective.loss(dirty, batch).total)
    assert objective.weight(batch).item() == 6


def test_a_negative_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match="z_loss"):
        LanguageModeling(z_loss=-1e-4)
