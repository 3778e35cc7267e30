"""A prompt encoded once for several completions gives what separate rows give, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_palm.models.logprobs import TokenLogProbs
from lit_palm.models.palm import PaLM, PaLMConfig
from lit_palm.models.shared_prompts import SharedPrompts, share_prompts

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


def together(model: PaLM, rows: Rows, packed: SharedPrompts) -> Tensor:
    head = TokenLogProbs(rows[0], rows[2], source=packed.source)
    return model(packed.tokens, positions=packed.positions, documents=packed.documents, prefixes=packed.prefixes,
                 head=head)["logps"]  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"xpos": True}, {"qk_norm": "l2"}, {"num_kv_heads": 2}])
def test_log_probabilities_and_gradients_are_those_of_separate_rows(changes: dict[str, object]) -> None:
    model = network(**changes)
    rows = rows_of([(9, [3, 5, 1]), (12, [2, 4, 4]), (7, [6, 1, 2]), (10, [3])])
    packed = share_prompts(*rows)
    assert packed is not None
    expected, found = separate(model, rows), together(model, rows, packed)
    # float64: the same products added in another order
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weight).sum(), list(model.parameters()))
    given_ = torch.autograd.grad((found * weight).sum(), list(model.parameters()))
    for one, other in zip(given_, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, 6), min_size=1, max_size=4)), min_size=1, max_size=4
    ),
    st.integers(0, 100),
)
def test_whatever_the_lengths(groups: list[tuple[int, list[int]]], seed: int) -> None:
    model, rows = network(), rows_of(groups, seed, vocab=3)  # of two tokens, so that completions begin alike too
    packed = share_prompts(*rows)
    if packed is None:
        return
    assert packed.tokens.numel() <= 0.9 * rows[0].numel()
    torch.testing.assert_close(together(model, rows, packed), separate(model, rows), rtol=1e-9, atol=1e-9)


def test_it_is_left_alone_where_it_does_not_pay() -> None:
    assert share_prompts(*rows_of([(5, [4]), (3, [2])])) is None, "nobody shares"
    assert share_prompts(*rows_of([(1, [20, 20]), (1, [20, 20])])) is None, "short prompts"
    assert share_prompts(*rows_of([(20, [2, 2]), (1, [20, 1])])) is not None


def test_it_is_left_alone_where_attention_would_cost_more_than_the_prompts() -> None:
    # of 16 completions of 1,000 tokens the mask alone has 270 million entries, to save a fifth of the tokens
    assert share_prompts(*rows_of([(300, [1000] * 16)])) is None
    assert share_prompts(*rows_of([(128, [128, 128])])) is not None


def test_what_is_not_the_same_is_not_shared() -> None:
    tokens, mask, targets, group = rows_of([(20, [2, 2, 2, 2])])
    tokens[2, 15] = tokens[2, 15] % 10 + 1  # the prompts of this group differ from here on
    rows = (tokens, mask, targets, group)
    packed = share_prompts(*rows)
    assert packed is not None and packed.tokens.shape[1] == 15 + 4 * 7
    torch.testing.assert_close(together(network(), rows, packed), separate(network(), rows), rtol=1e-10, atol=1e-10)


def test_a_packed_row_may_be_longer_than_the_context() -> None:
    rows = rows_of([(30, [30, 30, 30])])
    packed = share_prompts(*rows)
    assert packed is not None and packed.tokens.shape[1] == 120
    torch.testing.assert_close(together(network(), rows, packed), separate(network(), rows), rtol=1e-9, atol=1e-9)
