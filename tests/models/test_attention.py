"""Attention within documents against the mask over whole rows, which the plain formula gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_palm.models import PaLMConfig, TokenLogProbs, palm
from lit_palm.models.attention import Documents, attend_within, bias_of, find_documents

ROWS = torch.tensor([[0] * 5 + [1] * 12 + [2] * 3 + [-1] * 4, [0] * 1 + [1] * 23, [7] * 24])


def test_documents_are_found_row_by_row() -> None:
    assert find_documents(ROWS) == Documents((5, 12, 3, 4, 1, 23, 24))
    assert find_documents(torch.tensor([[3, 3], [3, 3]])) == Documents((2, 2))


@pytest.mark.parametrize(
    "rows", [torch.tensor([[0, 1, 0]]), torch.zeros(2, 0).long(), torch.zeros(1, 2, device="meta")]
)
def test_what_cannot_be_cut_out_is_masked(rows: Tensor) -> None:
    assert find_documents(rows) is None


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_the_formula(kv_heads: int) -> None:
    """float64 on either side, against softmax(q k^T / sqrt(d) + mask) v written out: rounding only."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(3, 24, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, kv_heads, kv_heads)
    )
    found = find_documents(ROWS)
    assert found is not None
    got = attend_within(q, k, v, found)
    bias = bias_of(torch.zeros(3, 24, 1, dtype=torch.float64), 0, None, ROWS, None)
    keys, values = (t.repeat_interleave(4 // kv_heads, 2) for t in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, keys) / 8**0.5 + bias
    expected = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), values)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(got)
    for mine, theirs in zip(
        torch.autograd.grad((got * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"xpos": True}, {"qk_norm": "layer"}, {"activation_checkpointing": True}])
def test_a_network_gives_the_same_with_a_mask(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities and gradients in float32, of both ways: 1e-4."""
    torch.manual_seed(0)
    network = PaLMConfig(vocab_size=30, d_model=48, num_layers=2, num_heads=3, head_dim=16, **settings).build()
    tokens, results = torch.randint(0, 30, (3, 24)), []
    for masked in (False, True):
        if masked:
            monkeypatch.setattr(palm, "find_documents", lambda documents: None)
        logps = network(tokens, documents=ROWS, head=TokenLogProbs(tokens, ROWS >= 0))["logps"]
        results.append((logps, torch.autograd.grad(logps.sum(), list(network.parameters()))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_no_score_between_documents_is_computed() -> None:
    network = PaLMConfig(vocab_size=30, d_model=48, num_layers=1, num_heads=3, head_dim=16).build()
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "attention" in str(func) and "backward" not in str(func):
                sizes.append((args[0].shape[2], args[1].shape[2], (kwargs or {}).get("attn_mask")))
            return func(*args, **(kwargs or {}))

    with Watch():
        network(torch.randint(0, 30, (3, 24)), documents=ROWS)
    assert sizes == [(n, n, None) for n in (5, 12, 3, 4, 1, 23, 24)]
