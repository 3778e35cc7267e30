"""Generalised advantage estimation against the sum of the paper, written out for one row at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_palm.rollout.advantages import generalized_advantages

# float64: a recursion against the sum it unrolls to, some ten terms of size 1
EXACT = {"rtol": 1e-9, "atol": 1e-9}


def paper(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Schulman et al. 2016, eq. 10, 16: delta_t = r_t + gamma V_{t+1} - V_t, A_t = sum_l (gamma lam)^l delta_{t+l}."""
    advantages = torch.zeros_like(values)
    for b in range(len(mask)):
        places = mask[b].nonzero().flatten().tolist()
        reward = [rewards[b, t].item() for t in places]
        value = [values[b, t].item() for t in places] + [0.0]  # nothing follows the last token
        for i, t in enumerate(places):
            terms = []
            for step in range(len(places) - i):
                delta = reward[i + step] + gamma * value[i + step + 1] - value[i + step]
                terms.append((gamma * lam) ** step * delta)
            advantages[b, t] = math.fsum(terms)
    return advantages


@st.composite
def ragged(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and masks of completions that begin and end anywhere, some of them empty."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for b in range(rows):
        start = draw(st.integers(0, width))
        mask[b, start : draw(st.integers(start, width))] = True
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rewards, values = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return rewards, values, mask


unit = st.sampled_from([0.0, 0.3, 0.95, 1.0])


@settings(max_examples=100, deadline=None)
@given(case=ragged(), gamma=unit, lam=unit)
def test_it_is_the_papers_sum(case: tuple[Tensor, Tensor, Tensor], gamma: float, lam: float) -> None:
    rewards, values, mask = case
    advantages, returns = generalized_advantages(rewards, values, mask, gamma, lam)
    expected = paper(rewards, values, mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, **EXACT)
    torch.testing.assert_close(returns, torch.where(mask, expected + values, 0), **EXACT)


@settings(max_examples=50, deadline=None)
@given(case=ragged(), gamma=unit)
def test_lambda_1_gives_monte_carlo_returns_whatever_the_values(
    case: tuple[Tensor, Tensor, Tensor], gamma: float
) -> None:
    rewards, values, mask = case
    _, returns = generalized_advantages(rewards, values, mask, gamma, lam=1.0)
    for b in range(len(mask)):
        places = mask[b].nonzero().flatten().tolist()
        for i, t in enumerate(places):
            discounted = math.fsum(gamma**k * rewards[b, s].item() for k, s in enumerate(places[i:]))
            assert returns[b, t].item() == pytest.approx(discounted, rel=1e-9, abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(case=ragged(), gamma=unit)
def test_lambda_0_gives_one_step_errors(case: tuple[Tensor, Tensor, Tensor], gamma: float) -> None:
    rewards, values, mask = case
    advantages, _ = generalized_advantages(rewards, values, mask, gamma, lam=0.0)
    inside = torch.where(mask, values, 0)
    following = torch.cat([inside[:, 1:], torch.zeros_like(inside[:, :1])], 1)
    torch.testing.assert_close(advantages, torch.where(mask, rewards + gamma * following - values, 0), **EXACT)


@settings(max_examples=50, deadline=None)
@given(case=ragged(), garbage=st.sampled_from([1e30, -1e30, math.inf, math.nan]), padding=st.integers(0, 4))
def test_nothing_outside_the_mask_has_influence(
    case: tuple[Tensor, Tensor, Tensor], garbage: float, padding: int
) -> None:
    rewards, values, mask = case
    clean = generalized_advantages(rewards, values, mask, 0.9, 0.8)
    dirty = [torch.where(mask, x, garbage) for x in (rewards, values)]
    wide = [torch.nn.functional.pad(x, (padding, padding), value=garbage) for x in dirty]
    wide_mask = torch.nn.functional.pad(mask, (padding, padding))
    for got, want in zip(generalized_advantages(*wide, wide_mask, 0.9, 0.8), clean, strict=True):
        assert torch.equal(got[:, padding : padding + mask.shape[1]], want)
        assert not got[~wide_mask].any()


def test_a_completion_by_hand() -> None:
    # gamma .5, lambda .5; deltas from the end: 4 - 1 = 3, then 0 + .5 * 1 - 2 = -1.5, A = -1.5 + .25 * 3
    rewards = torch.tensor([[9.0, 0.0, 4.0, 9.0]])
    values = torch.tensor([[9.0, 2.0, 1.0, 9.0]])
    mask = torch.tensor([[False, True, True, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.0, -0.75, 3.0, 0.0]]
    assert returns.tolist() == [[0.0, 1.25, 4.0, 0.0]]


def test_perfect_values_leave_no_advantage() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    mask = torch.arange(7) >= torch.tensor([[0], [2], [5]])
    _, values = generalized_advantages(rewards, torch.zeros_like(rewards), mask, gamma=0.9, lam=1.0)
    advantages, _ = generalized_advantages(rewards, values, mask, gamma=0.9, lam=0.4)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages), **EXACT)


def test_arguments_are_left_as_they_were() -> None:
    rewards, values, mask = torch.ones(1, 3), torch.ones(1, 3), torch.tensor([[False, True, True]])
    generalized_advantages(rewards, values, mask)
    assert rewards.tolist() == values.tolist() == [[1.0, 1.0, 1.0]]
