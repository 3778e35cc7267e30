"""Rows laid side by side, their prompts once, give what padded rows give, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_palm.models.logprobs import TokenLogProbs
from lit_palm.models.palm import PaLM, PaLMConfig
from lit_palm.models.side_by_side import KEYS_AND_VALUES, WORTHWHILE, SideBySide, side_by_side

Rows = tuple[Tensor, Tensor, Tensor, Tensor]


def rows_of(groups: list[tuple[int, list[int]]], seed: int = 0, vocab: int = 11) -> Rows:
    """Tokens, mask, targets and group of rows made of (prompt length, completion lengths), in a mixed order."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number, (prompt, completions) in enumerate(groups):
        start = torch.randint(1, vocab, (prompt,), generator=generator)
        for length in completions:
            rows.append(
                (number * 7, prompt, torch.cat([start, torch.randint(1, vocab, (length,), generator=generator)]))
            )
    rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    width = max(len(row[2]) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask, targets = torch.zeros_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.bool)
    for b, (_, prompt, ids) in enumerate(rows):
        tokens[b, : len(ids)], mask[b, : len(ids)], targets[b, prompt : len(ids)] = ids, True, True
    return tokens, mask, targets, torch.tensor([row[0] for row in rows])


def network(**changes: object) -> PaLM:
    torch.manual_seed(0)
    options = {"vocab_size": 11, "d_model": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8, "max_length": 64}
    return PaLMConfig(**{**options, **changes}).build().double()


def separate(model: PaLM, rows: Rows) -> Tensor:
    tokens, _, targets, _ = rows
    return model(tokens, head=TokenLogProbs(tokens, targets, entropy=True))["logps"]


def together(model: PaLM, rows: Rows, found: SideBySide) -> Tensor:
    head = TokenLogProbs(rows[0], rows[2], source=found.source)
    return model(found.tokens, positions=found.positions, sequences=found.sequences, head=head)["logps"]


GROUPS = [(9, [3, 5, 1]), (12, [2, 4, 4]), (7, [6, 1, 2]), (10, [3])]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"xpos": True},
        {"qk_norm": "l2"},
        {"qk_norm": "layer"},
        {"num_kv_heads": 2},
        {"activation_checkpointing": True},
        {"num_layers": 1},
    ],
)
@pytest.mark.parametrize("depth", [None, 2])
def test_log_probabilities_and_gradients_are_those_of_separate_rows(
    changes: dict[str, object], depth: int | None
) -> None:
    model = network(**changes)
    rows = rows_of(GROUPS)
    found = side_by_side(*rows, depth)
    assert found is not None
    # a prompt's last token is read once, for the first tokens of all its completions
    assert found.sequences.read == (None if depth is None else sum(sum(c) - len(c) + 1 for _, c in GROUPS))
    expected, given_ = separate(model, rows), together(model, rows, found)
    # float64: the same products added in another order
    torch.testing.assert_close(given_, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), list(model.parameters()))
    gradients = torch.autograd.grad((given_ * weight).sum(), list(model.parameters()))
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_every_token_is_computed_once() -> None:
    tokens, mask, targets, group = rows_of(GROUPS)
    found = side_by_side(tokens, mask, targets, group)
    assert found is not None
    # prompts once, every completion, no padding
    assert found.tokens.shape == (1, sum(prompt + sum(parts) for prompt, parts in GROUPS))
    place, home, shared, copies, _ = found.sequences
    assert torch.equal(found.tokens[0][place][mask], tokens[mask])
    assert torch.equal(found.positions[0][place][mask], torch.arange(tokens.shape[1]).expand_as(tokens)[mask])
    assert torch.equal(place.flatten()[home], torch.arange(len(home)))
    assert len(shared) == 9 + 12 + 7 and copies.shape == (len(shared), 3)
    for token, where in zip(shared.tolist(), copies.tolist(), strict=True):
        real = (place.flatten() == token) & mask.flatten()
        assert sorted(where) == real.nonzero().flatten().tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1, max_size=4
    ),
    st.integers(0, 100),
    st.sampled_from([None, 2]),
)
def test_whatever_the_lengths(groups: list[tuple[int, list[int]]], seed: int, depth: int | None) -> None:
    model, rows = network(), rows_of(groups, seed, vocab=3)  # of two tokens, so that completions begin alike too
    found = side_by_side(*rows, depth)
    if found is None:
        return
    read = found.sequences.read or 0
    spared = 0.0 if depth is None else (found.tokens.numel() - read) * (1 - KEYS_AND_VALUES) / depth
    assert found.tokens.numel() - spared <= WORTHWHILE * rows[0].numel()
    assert depth is None or torch.equal(found.source[rows[2]].unique(), torch.arange(read))
    weight = torch.rand(rows[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    results = []
    for logps in (together(model, rows, found), separate(model, rows)):
        results.append([logps.detach(), *torch.autograd.grad((logps * weight).sum(), list(model.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_a_last_target_that_nothing_follows_is_not_computed() -> None:
    """Unless a network's result is read everywhere; a row without targets is left out whole."""
    rows = rows_of(GROUPS)
    real = int(rows[1].sum())
    completions = [len(parts) for _, parts in GROUPS]
    copies = sum(prompt * (len(parts) - 1) for prompt, parts in GROUPS)
    found, whole = side_by_side(*rows, 2), side_by_side(*rows)
    assert found is not None and whole is not None
    assert whole.tokens.numel() == real - copies
    assert found.tokens.numel() == real - copies - sum(completions)
    tokens, mask, targets, group = rows
    alone = (group == 21).nonzero().item()
    targets[alone] = False
    left = side_by_side(tokens, mask, targets, group, 2)
    assert left is not None and left.tokens.numel() == found.tokens.numel() - 12
    torch.testing.assert_close(
        together(network(), rows, left)[targets], separate(network(), rows)[targets], rtol=1e-10, atol=1e-10
    )
    targets[:] = False
    assert side_by_side(tokens, mask, targets, torch.arange(len(group)), 2) is None


def test_it_is_left_alone_where_it_does_not_pay() -> None:
    assert side_by_side(*rows_of([(5, [4]), (3, [6])])) is None, "nobody shares, nothing is padded"
    assert side_by_side(*rows_of([(1, [20, 20]), (1, [20, 20])])) is None, "short prompts"
    assert side_by_side(*rows_of([(20, [2, 2]), (1, [20, 1])])) is not None
    assert side_by_side(*rows_of([(5, [4]), (3, [2])])) is not None, "padding alone"


def test_what_is_not_the_same_is_not_shared() -> None:
    tokens, mask, targets, group = rows_of([(20, [2, 2, 2, 2])])
    tokens[2, 15] = tokens[2, 15] % 10 + 1  # the prompts of this group differ from here on
    rows = (tokens, mask, targets, group)
    found = side_by_side(*rows)
    assert found is not None and found.tokens.shape[1] == 15 + 4 * 7
    torch.testing.assert_close(together(network(), rows, found), separate(network(), rows), rtol=1e-10, atol=1e-10)


def test_together_they_may_be_longer_than_the_context() -> None:
    rows = rows_of([(30, [30, 30, 30])])
    found = side_by_side(*rows)
    assert found is not None and found.tokens.shape[1] == 120
    torch.testing.assert_close(together(network(), rows, found), separate(network(), rows), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="60 tokens are more than max_length"):
        together(network(max_length=59), rows, found)


def test_rows_that_fill_a_batch_up_change_nothing() -> None:
    rows = rows_of(GROUPS)
    filled = [torch.cat([t, t.new_zeros(2, *t.shape[1:])]) for t in rows[:3]]
    found = side_by_side(*filled, torch.cat([rows[3], torch.tensor([0, 99])]))
    assert found is not None
    given_ = together(network(), (*filled, rows[3]), found)
    torch.testing.assert_close(given_[:-2], separate(network(), rows), rtol=1e-10, atol=1e-10)
    assert not given_[-2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_numbers(dtype: torch.dtype) -> None:
    model = network(num_layers=1).float()
    rows = rows_of(GROUPS)
    found = side_by_side(*rows)
    assert found is not None
    wanted = torch.autograd.grad(separate(model, rows).sum(), list(model.parameters()))
    model = model.to(dtype)
    gradients = torch.autograd.grad(together(model, rows, found).sum(), list(model.parameters()))
    # relative to the largest number: float32's 1.2e-7 and bfloat16's 7.8e-3 to the last place, a few roundings of each
    bound = {torch.float32: 2e-6, torch.bfloat16: 4e-2}[dtype]
    for one, other in zip(gradients, wanted, strict=True):
        assert (one.float() - other).abs().max() <= bound * other.abs().max()
