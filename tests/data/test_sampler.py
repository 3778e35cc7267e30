"""The loader: order, shares of processes, and resuming."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_palm.data.sampler import CountedLoader, permutation


def loader(size: int, batch_size: int, rank: int = 0, world: int = 1, **options: Any) -> CountedLoader:
    """Batches are (elements, blank)."""
    return CountedLoader(
        size, batch_size, lambda rows, blank: (rows.tolist(), blank), ranks=lambda: (rank, world), **options
    )


@settings(max_examples=100, deadline=None)
@given(size=st.integers(0, 300), seed=st.integers(-5, 2**40), epoch=st.integers(0, 1000))
def test_permutation_is_one_and_depends_on_its_arguments_alone(size: int, seed: int, epoch: int) -> None:
    order = permutation(size, seed, epoch)
    assert sorted(order.tolist()) == list(range(size))
    assert np.array_equal(order, permutation(size, seed, epoch))
    if size > 50:
        assert not np.array_equal(order, permutation(size, seed, epoch + 1))
        assert not np.array_equal(order, permutation(size, seed + 1, epoch))


def test_permutations_are_uniform() -> None:
    # where element 0 of 8 lands over 4000 epochs: chi-square with 7 degrees of freedom, 24.3 is its 99.9th percentile;
    # the seed is fixed, so this does not flake
    places = np.bincount([permutation(8, 3, e).tolist().index(0) for e in range(4000)], minlength=8)
    assert ((places - 500) ** 2 / 500).sum() < 24.3


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 60), batch_size=st.integers(1, 7), world=st.integers(1, 5), shuffle=st.booleans())
def test_processes_share_what_one_process_would_do(size: int, batch_size: int, world: int, shuffle: bool) -> None:
    alone = [rows for rows, _ in loader(size, batch_size * world, shuffle=shuffle, seed=1)]
    shares = [list(loader(size, batch_size, rank, world, shuffle=shuffle, seed=1)) for rank in range(world)]
    lengths = {len(share) for share in shares}
    assert lengths == {len(alone)} == {len(loader(size, batch_size, 0, world))}
    for batch, together in enumerate(alone):
        parts = [share[batch] for share in shares]
        assert [row for rows, blank in parts if not blank for row in rows] == together
        assert all(1 <= len(rows) <= batch_size for rows, _ in parts)
    assert sorted(row for rows in alone for row in rows) == list(range(size))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 5), stop=st.integers(0, 8), epoch=st.integers(0, 3))
def test_resuming_continues_where_it_stopped(size: int, batch_size: int, stop: int, epoch: int) -> None:
    whole = loader(size, batch_size, shuffle=True)
    epochs = [list(whole) for _ in range(epoch + 2)]
    resumed = loader(size, batch_size, shuffle=True, epoch=epoch, batch=stop)
    assert len(resumed) == len(epochs[epoch])
    assert list(resumed) == epochs[epoch][stop:]
    assert list(resumed) == epochs[epoch + 1]


def test_the_epoch_is_read_when_the_first_batch_is_asked_for() -> None:
    ours = loader(20, 4, shuffle=True)
    early = iter(ours)
    ours.batch_sampler.sampler.set_epoch(2)  # as Lightning does it, after making the iterator
    assert [rows for rows, _ in early] == permutation(20, 0, 2).reshape(5, 4).tolist()


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        loader(3, 0)


def test_length_window_sorts_within_windows_and_loses_nothing() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 103)
    batches = []

    def collate(elements: np.ndarray, blank: bool) -> None:
        batches.append(elements)

    loader = CountedLoader(103, 4, collate, shuffle=True, lengths=lengths, length_window=8)
    list(loader)
    assert sorted(np.concatenate(batches).tolist()) == list(range(103))
    spread = np.mean([np.ptp(lengths[b]) for b in batches])
    plain: list[np.ndarray] = []
    list(CountedLoader(103, 4, lambda e, blank: plain.append(e), shuffle=True))
    assert spread < 0.5 * np.mean([np.ptp(lengths[b]) for b in plain])
    # a window's batches are not in the order of their length
    means = [lengths[b].mean() for b in batches[:8]]
    assert means != sorted(means)
    # two processes are one process of twice the batch, cut in two
    one: list[np.ndarray] = []
    list(CountedLoader(103, 4, lambda e, b: one.append(e), shuffle=True, lengths=lengths, length_window=8))
    halves: list[list[np.ndarray]] = [[], []]
    for rank in (0, 1):
        store = halves[rank]
        options = {"shuffle": True, "lengths": lengths, "length_window": 8, "ranks": lambda r=rank: (r, 2)}
        list(CountedLoader(103, 2, lambda e, b, s=store: s.append(e), **options))
    joined = [np.concatenate(pair).tolist() for pair in zip(*halves, strict=True)]
    assert joined[:-1] == [b.tolist() for b in one[:-1]]
