"""Masked moments, KL estimators, running moments and pairs, against numpy, exact expectations and plain loops."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_palm.objectives.functional import (
    MAX_EXPONENT,
    RunningMoments,
    kl_estimate,
    logistic_loss,
    masked_mean,
    masked_whiten,
    pairs_of_rankings,
    rows_that_count,
)
from lit_palm.types import Experience

# float64 throughout: what is compared are two orders of summation of at most some hundred numbers
EXACT = {"rtol": 1e-10, "atol": 1e-10}

masks = st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6).map(torch.tensor)
numbers = st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(mask=masks, generator=numbers)
def test_masked_mean_and_whitening_are_numpys_of_the_masked_values(mask: Tensor, generator: torch.Generator) -> None:
    values = 3 + 2 * torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    picked = values[mask].numpy()
    assert masked_mean(values, mask).item() == pytest.approx(picked.mean() if len(picked) else 0.0, rel=1e-10)
    white = masked_whiten(values, mask)
    assert not white[~mask].any()
    if len(picked) > 1:
        # the 1e-8 under the root is part of the definition (it keeps equal values at zero)
        expected = (picked - picked.mean()) / np.sqrt(picked.var(ddof=1) + 1e-8)
        np.testing.assert_allclose(white[mask].numpy(), expected, rtol=1e-9, atol=1e-9)


def test_whitening_gives_mean_0_and_unbiased_variance_1() -> None:
    torch.manual_seed(0)
    mask = torch.rand(40, 30) < 0.4
    white = masked_whiten(100 + 7 * torch.randn(40, 30), mask)[mask].double()
    # float32 values near 100 carry an error of 4e-6, which is 6e-7 of their deviation
    assert abs(white.mean().item()) < 1e-5
    assert abs(white.var().item() - 1) < 1e-5


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_whitening_equal_values_or_one_value_gives_zero_and_not_nan(value: float) -> None:
    mask = torch.tensor([[True, True, False], [False, True, False]])
    assert not masked_whiten(torch.full((2, 3), value), mask).any()
    assert not masked_whiten(torch.full((2, 3), value), torch.eye(2, 3, dtype=torch.bool) & mask).any()
    assert not masked_whiten(torch.full((2, 3), value), torch.zeros(2, 3, dtype=torch.bool)).any()


def test_nothing_outside_the_mask_has_influence() -> None:
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    clean = torch.randn(2, 4)
    for garbage in (1e30, math.inf, math.nan):
        dirty = torch.where(mask, clean, garbage)
        assert torch.equal(masked_mean(dirty, mask), masked_mean(clean, mask))
        assert torch.equal(masked_whiten(dirty, mask), masked_whiten(clean, mask))


# ---------------------------------------------------------------------- KL estimators


def categorical(size: int, seed: int, spread: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a policy and a reference over `size` tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator, dtype=torch.float64)
    moved = logits + spread * torch.randn(size, generator=generator, dtype=torch.float64)
    return logits.log_softmax(0), moved.log_softmax(0)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0])
def test_k1_and_k3_are_unbiased(estimator: str, spread: float) -> None:
    policy, reference = categorical(17, seed=3, spread=spread)
    exact = (policy.exp() * (policy - reference)).sum()
    expected = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()  # every token, by its probability
    torch.testing.assert_close(expected, exact, **EXACT)


def test_k2_is_biased_by_third_order_only() -> None:
    def bias(step: float) -> float:
        logits = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
        policy = logits.log_softmax(0)
        reference = (logits + step * torch.tensor([1.0, 0.0, 0.0])).log_softmax(0)
        exact = (policy.exp() * (policy - reference)).sum()
        return ((policy.exp() * kl_estimate(policy, reference, "k2")).sum() - exact).item()

    # halving the distance divides a third-order term by 8 (one of second order by 4); the next order is 2% of it here
    assert bias(0.02) / bias(0.01) == pytest.approx(8, rel=0.05)


def test_sampled_means_approach_the_exact_divergence() -> None:
    policy, reference = categorical(11, seed=5, spread=0.7)
    exact = (policy.exp() * (policy - reference)).sum()
    tokens = torch.multinomial(policy.exp(), 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    for estimator in ("k1", "k3"):
        samples = kl_estimate(policy, reference, estimator)[tokens]
        error = samples.std() / len(tokens) ** 0.5
        assert abs(samples.mean() - exact) < 4 * error, "four standard errors of the mean"


def test_k2_and_k3_are_never_negative_where_k1_is() -> None:
    policy, reference = categorical(50, seed=1, spread=2.0)
    assert (kl_estimate(policy, reference, "k1") < 0).any()
    for estimator in ("k2", "k3"):
        assert (kl_estimate(policy, reference, estimator) >= 0).all()


def test_in_a_loss_k1_has_no_gradient_on_average_and_k2_has_that_of_the_divergence() -> None:
    logits = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    _, reference = categorical(9, seed=4, spread=1.0)
    policy = logits.log_softmax(0)

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    weights = policy.detach().exp()
    exact = gradient((policy.exp() * (policy - reference)).sum())
    k1 = gradient((weights * kl_estimate(policy, reference, "k1")).sum())
    torch.testing.assert_close(k1, torch.zeros_like(k1), **EXACT)
    torch.testing.assert_close(gradient((weights * kl_estimate(policy, reference, "k2")).sum()), exact, **EXACT)


@pytest.mark.parametrize("difference", [-1e4, -100.0, 100.0, 1e4])
def test_extreme_log_probabilities_stay_finite(difference: float) -> None:
    logps = torch.tensor([difference], requires_grad=True)
    for estimator in ("k1", "k2", "k3"):
        value = kl_estimate(logps, torch.zeros(1), estimator)
        (gradient,) = torch.autograd.grad(value.sum(), logps)
        assert value.isfinite().all() and gradient.isfinite().all(), estimator
    assert kl_estimate(logps, torch.zeros(1), "k3").item() <= math.exp(MAX_EXPONENT) + abs(difference)


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match=r"k4.*k1, k2 or k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- running moments

batches = st.lists(st.lists(st.floats(-1e3, 1e3), max_size=7), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(parts=batches)
def test_running_moments_are_numpys_over_everything_seen(parts: list[list[float]]) -> None:
    moments = RunningMoments()
    for part in parts:
        moments.update(torch.tensor(part, dtype=torch.float64))
    everything = np.concatenate([np.array(p, dtype=np.float64) for p in parts])
    assert moments.count == len(everything)
    if len(everything):
        # both cancel terms of size 1e3; float64 keeps 1e-16 of these (1e-13), squares 1e-10
        assert moments.mean == pytest.approx(everything.mean(), rel=1e-9, abs=1e-9)
    if len(everything) > 1 and everything.std() > 1e-3:
        assert moments.std == pytest.approx(everything.std(ddof=1), rel=1e-6)


def test_running_moments_keep_digits_beside_a_large_mean() -> None:
    values = 1e6 + torch.randn(1000, dtype=torch.float64)
    moments = RunningMoments()
    for part in values.split(37):
        moments.update(part)
    # a sum of squares minus a squared sum would lose 12 of 16 digits here
    assert moments.std == pytest.approx(values.std().item(), rel=1e-9)


def test_running_moments_say_1_when_there_is_no_spread() -> None:
    moments = RunningMoments()
    assert moments.std == 1.0
    moments.update(torch.tensor([0.1]))
    assert moments.std == 1.0
    for size in (7, 12, 128):  # equal float32 numbers have no spread in float64, whatever their number
        moments.update(torch.full((size,), 0.1))
    assert moments.std == 1.0 and moments.mean == pytest.approx(0.1)


def test_running_moments_continue_after_a_round_trip() -> None:
    first, second = torch.randn(13), torch.randn(5, 4)
    moments, resumed = RunningMoments(), RunningMoments()
    moments.update(first)
    resumed.load_state_dict(moments.state_dict())
    for m in (moments, resumed):
        m.update(second)
    assert resumed.state_dict() == moments.state_dict()
    assert all(type(v) in (int, float) for v in moments.state_dict().values()), "plain numbers load with weights_only"


# ---------------------------------------------------------------------- pairs

rankings = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(rows=rankings)
def test_pairs_are_all_pairs_of_different_rank_within_a_group(rows: list[tuple[int, int]]) -> None:
    group, rank = torch.tensor(rows).unbind(1)
    better, worse, of = pairs_of_rankings(Experience(group=group, rank=rank))
    expected = {
        (i, j) if rows[i][1] < rows[j][1] else (j, i)
        for i, j in combinations(range(len(rows)), 2)
        if rows[i][0] == rows[j][0] and rows[i][1] != rows[j][1]
    }
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == expected
    assert len(better) == len(expected)
    assert of.tolist() == [rows[i][0] for i in better.tolist()]


def test_logistic_loss_is_exact_where_it_can_be_computed_and_linear_beyond() -> None:
    small = torch.linspace(-20, 20, 41, dtype=torch.float64)
    torch.testing.assert_close(logistic_loss(small), -torch.log(1 / (1 + torch.exp(-small))), rtol=1e-6, atol=1e-12)
    assert logistic_loss(torch.tensor([-1e4, 1e4])).tolist() == [1e4, 0.0]


def test_a_row_without_targets_does_not_count() -> None:
    tokens = torch.ones(3, 4, dtype=torch.long)
    loss_mask = torch.tensor([[False, True, True, False], [False] * 4, [False, False, False, True]])
    assert rows_that_count(Experience(tokens=tokens, loss_mask=loss_mask)).tolist() == [True, False, True]
    assert rows_that_count(Experience(tokens=tokens)).tolist() == [True, True, True]
