"""Rows cut into parts: each row once, groups whole, and no cut that costs less."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_palm.rollout.lengths import cost_of_a_pass, parts_of_similar_length

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=9)
GROUPED = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=12)


def cost(lengths: list[int], parts: list[list[int]], fixed: int) -> int:
    return sum(fixed + len(part) * max(lengths[i] for i in part) for part in parts)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, fixed=st.integers(0, 40), most=st.integers(1, 9))
def test_no_cut_of_the_sorted_rows_costs_less(lengths: list[int], fixed: int, most: int) -> None:
    parts = [p.tolist() for p in parts_of_similar_length(torch.tensor(lengths), fixed, most=most)]
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert max(map(len, parts)) <= most
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    best = min(
        cost(lengths, cut, fixed)
        for bits in range(2 ** (len(lengths) - 1))
        for ends in [[0, *(i + 1 for i in range(len(lengths) - 1) if bits >> i & 1), len(lengths)]]
        for cut in [[order[a:b] for a, b in pairwise(ends)]]
        if max(map(len, cut)) <= most
    )
    assert cost(lengths, parts, fixed) == best
    if len(parts) == 1:
        assert parts[0] == list(range(len(lengths))), "one part is the batch as it is"


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 3)), min_size=1, max_size=12), most=st.integers(3, 12)
)
def test_groups_stay_whole_where_a_part_can_hold_them(rows: list[tuple[int, int]], most: int) -> None:
    lengths, groups = (torch.tensor(column) for column in zip(*rows, strict=True))
    parts = parts_of_similar_length(lengths, 5, groups, most)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(rows)))
    assert max(map(len, parts)) <= most
    for number in groups.unique():
        size = int((groups == number).sum())
        holding = [part for part in parts if bool((groups[part] == number).any())]
        assert len(holding) == 1 or size > most
        for part in holding:  # side by side, so that they may share their prompt
            places = (groups[part] == number).nonzero().flatten()
            assert len(parts) == 1 or int(places[-1] - places[0]) == len(places) - 1


def test_lengths_of_real_completions_leave_little_padding() -> None:
    """Geometric lengths, mean 64, at most 256, behind prompts of 32: 128 rows padded together are half padding."""
    torch.manual_seed(0)
    lengths = 32 + torch.empty(128).geometric_(1 / 64).clamp(max=256).long()
    parts = parts_of_similar_length(lengths, cost_of_a_pass(lengths.device), most=64)
    padded = sum(len(part) * int(lengths[part].max()) for part in parts)
    real = int(lengths.sum())
    assert 128 * int(lengths.max()) > 2.5 * real
    assert padded < 1.15 * real
    assert len(parts) < 20


@pytest.mark.parametrize("lengths", [[7] * 5, [9, 8, 8, 9]])
def test_rows_alike_are_not_cut(lengths: list[int]) -> None:
    parts = parts_of_similar_length(torch.tensor(lengths), 4)
    assert [p.tolist() for p in parts] == [list(range(len(lengths)))]
