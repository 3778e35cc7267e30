"""Tokens drawn in C++ against `sampling.sample` and float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_palm.native import find_compiler
from lit_palm.rollout.draw_native import draw
from lit_palm.rollout.sampling import sample

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no compiler for this processor")


def drawn(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = draw(logits, uniforms)
    assert found is not None
    return found


@pytest.mark.parametrize("size", [1, 5, 16, 250, 257, 5000, 32_001])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_what_sampling_draws(size: int, spread: float) -> None:
    """Float32 exponentials differ in their last bits: a uniform number may lie in between, once in some 100,000."""
    rows = 300
    logits, uniforms = torch.randn(rows, size) * spread, torch.rand(rows, dtype=torch.float64)
    tokens, logps, norms = drawn(logits, uniforms)
    expected = sample((logits - logits.amax(1, keepdim=True)).exp(), uniforms)
    assert int((tokens != expected).sum()) <= 1
    exact = logits.double().log_softmax(1)
    at = torch.arange(rows)
    # float32: a logit of 100 has steps of 8e-6, its log-probability of -100 too
    torch.testing.assert_close(logps.double(), exact[at, tokens], rtol=1e-6, atol=1e-6 * spread)
    torch.testing.assert_close((logits - norms)[at, tokens].double(), exact[at, tokens], rtol=1e-6, atol=1e-5 * spread)


def test_a_row_s_token_is_its_own() -> None:
    logits, uniforms = torch.randn(70, 3000), torch.rand(70, dtype=torch.float64)
    together = drawn(logits, uniforms)
    for row in range(70):
        alone = drawn(logits[row : row + 1], uniforms[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
    spaced = torch.stack((uniforms, -uniforms), 1)[:, 0]
    assert torch.equal(drawn(logits, spaced)[0], together[0])


@pytest.mark.parametrize("size", [7, 300, 2000])
def test_the_ends_and_what_is_excluded(size: int) -> None:
    """The first and the last token that may be drawn, for the smallest and the largest uniform number."""
    logits = torch.full((3, size), -math.inf)
    places = [size // 3, size // 3 + 1, size - 2]
    logits[:, places] = torch.randn(3, 3)
    uniforms = torch.tensor([0.0, 1 - 2.0**-52, 0.5], dtype=torch.float64)
    tokens, logps, _ = drawn(logits, uniforms)
    assert tokens.tolist()[:2] == [places[0], places[2]] and int(tokens[2]) in places
    assert bool(logps.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_told(value: float) -> None:
    logits = torch.randn(2, 100)
    logits[1, 40] = value
    _, logps, _ = drawn(logits, torch.rand(2, dtype=torch.float64))
    assert logps.isfinite().tolist() == [True, False]


def test_what_it_is_not_written_for() -> None:
    uniforms = torch.rand(2, dtype=torch.float64)
    assert draw(torch.randn(2, 8).double(), uniforms) is None
    assert draw(torch.randn(8, 2).t(), uniforms) is None
