"""Packing and masks as properties: nothing is lost, nothing is learned twice, nobody sees a neighbour."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_palm.data.packing import Windows, pack, split_documents

PAD = 999
documents = st.lists(st.integers(1, 30), min_size=1, max_size=20)


def windows(lengths: list[int], room: int, packed: bool) -> tuple[Windows, np.ndarray]:
    """Documents whose tokens are 0, 1, 2, ... so that a token names its place."""
    sizes = np.asarray(lengths)
    tokens = np.arange(sizes.sum(), dtype=np.int32)
    starts, pieces = split_documents(sizes, room)
    return Windows(tokens, starts, pieces, PAD, room=room if packed else None), tokens


@settings(max_examples=150, deadline=None)
@given(lengths=documents, room=st.integers(2, 17), packed=st.booleans())
def test_every_token_but_the_first_of_a_document_is_a_target_once(lengths: list[int], room: int, packed: bool) -> None:
    rows, tokens = windows(lengths, room, packed)
    batch = rows.collate(np.arange(len(rows)))
    firsts = set((np.cumsum(lengths) - lengths).tolist())
    targets = Counter(batch.tokens[batch.loss_mask].tolist())
    assert targets == Counter(t for t in tokens.tolist() if t not in firsts)
    assert bool(batch.mask[batch.loss_mask].all())
    assert set(batch.tokens[batch.mask].tolist()) == set(tokens.tolist())
    assert bool((batch.tokens[~batch.mask] == PAD).all())
    assert bool((batch.mask[:, :-1] >= batch.mask[:, 1:]).all())  # right-padded
    assert batch.tokens.shape[1] <= room


@settings(max_examples=150, deadline=None)
@given(lengths=documents, room=st.integers(2, 17))
def test_a_packed_token_sees_the_tokens_before_it_in_its_document_only(lengths: list[int], room: int) -> None:
    rows, _ = windows(lengths, room, packed=True)
    batch = rows.collate(np.arange(len(rows)))
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    assert batch.tokens.shape[1] == room
    assert bool(((batch.documents == -1) == ~batch.mask).all())
    for tokens, docs, positions, mask, targets in zip(
        batch.tokens, batch.documents, batch.positions, batch.mask, batch.loss_mask, strict=True
    ):
        for piece in docs[mask].unique():
            inside = tokens[docs == piece]
            assert len(set(document_of[inside.numpy()].tolist())) == 1
            assert torch.equal(inside, torch.arange(int(inside[0]), int(inside[0]) + len(inside)))
            assert torch.equal(positions[docs == piece], torch.arange(len(inside)))
            assert not targets[docs == piece][0] and bool(targets[docs == piece][1:].all())
        numbers = docs[mask]
        assert bool((numbers[1:] >= numbers[:-1]).all())


@settings(max_examples=200, deadline=None)
@given(room=st.integers(1, 40), data=st.data())
def test_packing_holds_every_piece_once_and_wastes_little(room: int, data: st.DataObject) -> None:
    lengths = np.asarray(data.draw(st.lists(st.integers(1, room), max_size=60)), np.int64)
    order, offsets = pack(lengths, room)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    fills = [int(lengths[order[a:b]].sum()) for a, b in pairwise(offsets)]
    assert all(0 < fill <= room for fill in fills)
    # any-fit packing opens a window only when no other has room: two windows never fit into one
    assert len(fills) < 2 or sum(sorted(fills)[:2]) > room


def test_packing_wastes_almost_nothing_on_short_documents() -> None:
    lengths = np.random.default_rng(0).integers(5, 60, 2000)
    _, offsets = pack(lengths, 64)
    # measured .980; filling windows in the order of the data gives .743
    assert lengths.sum() / (64 * (len(offsets) - 1)) > 0.97


def test_a_blank_row_has_no_weight() -> None:
    rows, _ = windows([5, 6], 8, packed=False)
    batch = rows.collate(np.array([1]), blank=True)
    assert batch.mask.sum() == 6 and batch.loss_mask.sum() == 0


def test_targets_choose_what_is_learned() -> None:
    targets = np.array([True, False, True, True])
    rows = Windows(np.arange(4), np.array([0]), np.array([4]), PAD, targets)
    assert rows.collate(np.array([0])).loss_mask.tolist() == [[False, False, True, True]]
