"""Tokens drawn in C++ against `sampling.sample` and float64."""

from __future__ import annotations

import math

import pytest
import torch

from lit_palm.native import find_compiler
from lit_palm.rollout import draw as module
from lit_palm.rollout.draw import draw
from lit_palm.rollout.row_sampling import RowSampling
from lit_palm.rollout.sampling import Sampling, sample

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="there is no compiler for this processor")


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often torch drew instead."""
    calls: list[int] = []
    by_torch = module._by_torch
    monkeypatch.setattr(module, "_by_torch", lambda *given: (calls.append(1), by_torch(*given))[1])
    return calls


@pytest.mark.parametrize("size", [1, 5, 16, 250, 257, 5000, 32_001])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_what_sampling_draws(size: int, spread: float, counted: list[int]) -> None:
    """Float32 exponentials differ in their last bits: a uniform number may lie in between, once in some 100,000."""
    rows = 300
    logits, uniforms = torch.randn(rows, size) * spread, torch.rand(rows, dtype=torch.float64)
    tokens, logps, norms = draw(logits, uniforms)
    assert not counted
    expected = sample((logits - logits.amax(1, keepdim=True)).exp(), uniforms)
    assert int((tokens != expected).sum()) <= 1
    exact = logits.double().log_softmax(1)
    at = torch.arange(rows)
    # float32: a logit of 100 has steps of 8e-6, its log-probability of -100 too
    torch.testing.assert_close(logps.double(), exact[at, tokens], rtol=1e-6, atol=1e-6 * spread)
    torch.testing.assert_close((logits - norms)[at, tokens].double(), exact[at, tokens], rtol=1e-6, atol=1e-5 * spread)


def test_a_row_s_token_is_its_own() -> None:
    logits, uniforms = torch.randn(70, 3000), torch.rand(70, dtype=torch.float64)
    together = draw(logits, uniforms)
    for row in range(70):
        alone = draw(logits[row : row + 1], uniforms[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
    spaced = torch.stack((uniforms, -uniforms), 1)[:, 0]
    assert torch.equal(draw(logits, spaced)[0], together[0])


@pytest.mark.parametrize("size", [7, 300, 2000])
def test_the_ends_and_what_is_excluded(size: int) -> None:
    """The first and the last token that may be drawn, for the smallest and the largest uniform number."""
    logits = torch.full((3, size), -math.inf)
    places = [size // 3, size // 3 + 1, size - 2]
    logits[:, places] = torch.randn(3, 3)
    uniforms = torch.tensor([0.0, 1 - 2.0**-52, 0.5], dtype=torch.float64)
    tokens, logps, _ = draw(logits, uniforms)
    assert tokens.tolist()[:2] == [places[0], places[2]] and int(tokens[2]) in places
    assert bool(logps.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_told(value: float) -> None:
    logits = torch.randn(2, 100)
    logits[1, 40] = value
    _, logps, _ = draw(logits, torch.rand(2, dtype=torch.float64))
    assert logps.isfinite().tolist() == [True, False]


def test_filtered_logits_and_chosen_tokens(counted: list[int]) -> None:
    """Drawn from some logits, told of others; what torch does in their stead gives the same."""
    rows, size = 200, 777
    logits, uniforms = torch.randn(rows, size) * 3, torch.rand(rows, dtype=torch.float64)
    allowed = logits.masked_fill(torch.rand(rows, size) < 0.5, -math.inf)
    chosen = torch.where(torch.rand(rows) < 0.3, logits.argmax(1), -1)
    found = draw(logits, uniforms, allowed, chosen)
    assert not counted
    expected = module._by_torch(logits, uniforms, allowed, chosen)
    assert int((found[0] != expected[0]).sum()) <= 1
    same = found[0] == expected[0]
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine[same], theirs[same], rtol=1e-6, atol=5e-6)
    assert torch.equal(found[0][chosen >= 0], chosen[chosen >= 0])
    at = torch.arange(rows)
    assert bool((allowed[at, found[0]] > -math.inf)[chosen < 0].all())
    everything = draw(logits, None, chosen=logits.argmax(1))
    assert torch.equal(everything[0], logits.argmax(1)) and torch.equal(everything[2], found[2])


def test_a_row_is_drawn_alike_beside_rows_of_other_settings() -> None:
    """Tokens, log-probabilities and norms to the last bit."""
    plain, others = Sampling(), [Sampling(temperature=0.0), Sampling(top_k=5), Sampling(min_new_tokens=3)]
    logits, uniforms = torch.randn(8, 3000), torch.rand(8, dtype=torch.float64)
    alone = RowSampling([plain] * 5, logits.device, 1).draw(logits[:5], uniforms[:5], [0] * 5, None, None)
    together = RowSampling([plain] * 5 + others, logits.device, 1).draw(logits, uniforms, [0] * 8, None, None)
    for mine, theirs in zip(alone, together, strict=True):
        assert torch.equal(mine, theirs[:5])
    assert int(together.tokens[5]) == int(logits[5].argmax())


def test_other_types_are_torch_s(counted: list[int]) -> None:
    uniforms = torch.rand(2, dtype=torch.float64)
    tokens, logps, _ = draw(torch.randn(2, 8).double(), uniforms)
    assert counted and tokens.dtype is torch.long and logps.dtype is torch.float32
    counted.clear()
    logits = torch.randn(8, 2)
    for turned, plain in zip(draw(logits.t(), uniforms), draw(logits.t().contiguous(), uniforms), strict=True):
        assert torch.equal(turned, plain)
    assert not counted
