"""Filters against transformers' logits processors, the hash against published SplitMix64, draws against counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lit_palm.rollout.sampling import Sampling, filter_logits, row_seeds, sample, uniform

# distinct multiples of 1/64: exact in float32, and no ties, among which the order would be anyone's choice
LOGITS = st.lists(st.integers(-600, 600), min_size=2, max_size=200, unique=True).map(
    lambda values: torch.tensor([values], dtype=torch.float32) / 64
)
PROFILE = settings(max_examples=150, deadline=None)


def check(mine: Tensor, theirs: Tensor) -> None:
    """The same tokens stay, with the same logits; both divide by the temperature, in one rounding."""
    assert torch.equal(mine.isinf(), theirs.isinf())
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@PROFILE
@given(LOGITS, st.integers(1, 250))
def test_top_k(logits: Tensor, k: int) -> None:
    check(filter_logits(logits, Sampling(top_k=k)), TopKLogitsWarper(k)(None, logits))


def far_from(p: float, logits: Tensor) -> bool:
    """No running sum of the ranked probabilities is within rounding of p, where either choice is right."""
    sums = logits.double().softmax(-1).sort(descending=True).values.cumsum(-1)
    return float((sums - p).abs().min()) > 1e-5


@PROFILE
@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p(logits: Tensor, p: float) -> None:
    assume(far_from(p, logits))
    check(filter_logits(logits, Sampling(top_p=p)), TopPLogitsWarper(p)(None, logits))


def test_top_p_of_a_flat_distribution_needs_more_than_the_first_ranks() -> None:
    logits = torch.linspace(0, 0.1, 5000)[torch.randperm(5000, generator=torch.Generator().manual_seed(0))][None]
    for p in (0.005, 0.3, 0.97):
        check(filter_logits(logits, Sampling(top_p=p)), TopPLogitsWarper(p)(None, logits))


@PROFILE
@given(LOGITS, st.floats(0.01, 1.0))
def test_min_p(logits: Tensor, p: float) -> None:
    probs = logits.double().softmax(-1)
    assume(float((probs / probs.max() - p).abs().min()) > 1e-5 or p == 1.0)
    check(filter_logits(logits, Sampling(min_p=p)), MinPLogitsWarper(p)(None, logits))


@PROFILE
@given(LOGITS, st.floats(0.5, 3.0), st.data())
def test_repetition_penalty(logits: Tensor, penalty: float, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, logits.shape[1] - 1), min_size=1, max_size=20))
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[0, ids] = True
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), logits)
    check(filter_logits(logits, Sampling(repetition_penalty=penalty), seen), theirs)


@PROFILE
@given(LOGITS, st.floats(0.3, 2.0), st.integers(1, 50), st.floats(0.1, 0.99), st.floats(0.01, 0.5), st.floats(1.0, 2.0))
def test_all_in_the_order_of_transformers(
    logits: Tensor, temperature: float, k: int, top_p: float, min_p: float, penalty: float
) -> None:
    ids = torch.arange(0, logits.shape[1], 3)[None]
    seen = torch.zeros_like(logits, dtype=torch.bool).index_fill(1, ids[0], True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    theirs = TemperatureLogitsWarper(temperature)(None, theirs)
    ranked = theirs[0].sort(descending=True).values
    assume(float((ranked[:-1] - ranked[1:]).min()) > 1e-4)  # the penalty may have made ties
    theirs = TopKLogitsWarper(k)(None, theirs)
    assume(far_from(top_p, theirs))
    theirs = TopPLogitsWarper(top_p)(None, theirs)
    probs = theirs.double().softmax(-1)
    assume(float((probs / probs.max() - min_p).abs().min()) > 1e-5)
    theirs = MinPLogitsWarper(min_p)(None, theirs)
    sampling = Sampling(temperature=temperature, top_k=k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    check(filter_logits(logits, sampling, seen), theirs)


@PROFILE
@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=50), st.integers(1, 50), st.floats(0.01, 1.0))
def test_something_always_stays_also_among_ties(values: list[float], k: int, p: float) -> None:
    logits = torch.tensor([values])
    kept = filter_logits(logits, Sampling(top_k=k, top_p=p, min_p=p))
    assert torch.equal(kept.argmax(1), logits.argmax(1)) and kept.isfinite().any()


def test_rows_are_filtered_each_by_itself_and_the_input_is_kept() -> None:
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    logits[0] *= 10
    before, sampling = logits.clone(), Sampling(top_p=0.8, temperature=0.5)
    together = filter_logits(logits, sampling)
    assert torch.equal(together, torch.cat([filter_logits(row[None], sampling) for row in logits]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("inf")),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("stop", "\n"),
        ("stop", [""]),
        ("max_new_tokens", 0),
        ("min_new_tokens", 65),
    ],
)
def test_bad_settings_are_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"sampling.{key}"):
        Sampling(**{key: value})


# ---------------------------------------------------------------- randomness from counters


def test_the_hash_is_splitmix64() -> None:
    # the first outputs of SplitMix64 from seed 1234567, as published with its reference implementations
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    expected = torch.tensor([(value >> 12) * 2.0**-52 for value in published], dtype=torch.float64)
    seeds = torch.tensor([1234567])
    assert torch.equal(torch.cat([uniform(seeds, step) for step in range(5)]), expected)
    assert torch.equal(uniform(seeds[:, None], torch.arange(5))[0], expected)


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    numbers = uniform(row_seeds(0, 0, torch.arange(500))[:, None], torch.arange(200))
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    # 100,000 numbers in 20 equal bins: chi-square with 19 degrees of freedom exceeds 43.8 once in a thousand
    counts = torch.histc(numbers, 20, 0, 1)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 43.8
    centred = numbers - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1)):  # the next row's, the next step's
        correlation = float((centred * other).mean()) * 12
        assert abs(correlation) < 4 / 100_000**0.5


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 10**6))
def test_any_seed_works(seed: int, collection: int) -> None:
    numbers = uniform(row_seeds(seed, collection, torch.arange(8)), 3)
    assert bool(((numbers >= 0) & (numbers < 1)).all())


def test_row_seeds_differ_by_seed_collection_and_row_only() -> None:
    rows = torch.arange(100)
    all_seeds = torch.cat([row_seeds(seed, collection, rows) for seed in range(10) for collection in range(10)])
    assert len(all_seeds.unique()) == 10_000
    assert torch.equal(row_seeds(3, 5, rows)[40:50], row_seeds(3, 5, torch.arange(40, 50)))


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("vocab_size", [7, 1000, 3001])
def test_draws_follow_the_probabilities(vocab_size: int) -> None:
    weights = torch.rand(vocab_size, generator=torch.Generator().manual_seed(0)) ** 4
    weights[::3] = 0
    n = 40_000
    # evenly spread uniforms: every token is drawn its share of times, to within one draw at either edge
    drawn = sample(weights.expand(n, -1), (torch.arange(n, dtype=torch.float64) + 0.5) / n)
    counts = drawn.bincount(minlength=vocab_size).double()
    expected = weights.double() / weights.double().sum() * n
    assert float((counts - expected).abs().max()) <= 1.01
    assert bool((drawn[1:] >= drawn[:-1]).all())


@PROFILE
@given(st.integers(2, 2500), st.data(), st.sampled_from([0.0, 2.0**-52, 0.5, 1 - 2.0**-52]))
def test_a_token_of_weight_zero_is_never_drawn(vocab_size: int, data: st.DataObject, u: float) -> None:
    allowed = data.draw(st.sets(st.integers(0, vocab_size - 1), min_size=1, max_size=5))
    weights = torch.zeros(1, vocab_size)
    weights[0, sorted(allowed)] = torch.tensor(data.draw(st.floats(1e-30, 1e30)))
    assert int(sample(weights, torch.tensor([u], dtype=torch.float64))) in allowed


@pytest.mark.parametrize("vocab_size", [50, 5000])
def test_a_draw_does_not_depend_on_the_batch(vocab_size: int) -> None:
    weights = torch.rand(9, vocab_size, generator=torch.Generator().manual_seed(0))
    uniforms = uniform(row_seeds(0, 0, torch.arange(9)), 0)
    together = sample(weights, uniforms)
    assert together.tolist() == [int(sample(weights[i : i + 1], uniforms[i : i + 1])) for i in range(9)]
