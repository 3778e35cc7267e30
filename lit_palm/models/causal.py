"""Causal attention of a processor in a few large matrix products.

torch's own kernel for processors takes one head and 32 to 512 tokens at a time, converts what is 16 bits wide and, in
float32, multiplies as slowly as MKL does (see `products`). Query heads that share a key/value head are the rows of one
matrix here, so that a block of queries is multiplied with all keys that it sees at once. A block sees whole rows of
scores: its softmax is computed in one pass and again in the backward pass, for which nothing but q, k and v is kept.

Scores and their gradients are float32 whatever the type of q, k and v; what a sum over keys or queries is made of has
their type, as in FlashAttention-2 (Dao 2023).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_palm.models.products import multiplies_quickly, product, weight_gradient

__all__ = ["causal_attention", "pays"]

SHORTEST = 256
"""Tokens of a row from which blocks are large enough."""
SCORES = 2**19
"""Scores of a block, so that they stay in the processor's cache."""


def pays(q: Tensor, k: Tensor, dtype: torch.dtype, dropout: float) -> bool:
    """Whether `causal_attention` of q [B, H, T, Dh] and k [B, K, T, Dh], as a type, is quicker than torch's."""
    return (
        q.is_cpu
        and type(q) is Tensor is type(k)  # not of a dry run
        and dtype in (torch.float32, torch.bfloat16)
        and q.shape[2] == k.shape[2] >= SHORTEST
        and not dropout
        and not torch.compiler.is_compiling()
        and multiplies_quickly()
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v over the tokens up to each query's own.

    Args:
        q: [B, H, T, Dh].
        k: [B, K, T, Dh], K a divisor of H.
        v: [B, K, T, Dh].

    Returns:
        [B, H, T, Dh], which lies in memory as [B, T, H, Dh].
    """
    result: Tensor = _Causal.apply(*(t.transpose(1, 2) for t in (q, k, v)))
    return result.transpose(1, 2)


def _size(q: Tensor, k: Tensor) -> int:
    """Queries of a block."""
    length, shared = q.shape[1], q.shape[2] // k.shape[2]
    return max(16, min(length, SCORES // (shared * length)))


def _blocks(q: Tensor, k: Tensor, size: int) -> Iterator[tuple[int, slice, slice, int]]:
    """Row, tokens, query heads and key/value head of each block of queries."""
    rows, length, heads = q.shape[:3]
    shared = heads // k.shape[2]
    for row, head, start in itertools.product(range(rows), range(k.shape[2]), range(0, length, size)):
        yield row, slice(start, min(start + size, length)), slice(head * shared, (head + 1) * shared), head


def _probabilities(queries: Tensor, keys: Tensor, tokens: slice, unseen: Tensor) -> Tensor:
    """[tokens * heads, tokens.stop] from scaled queries [tokens * heads, Dh] and keys [tokens.stop, Dh]."""
    scores = product(queries, keys)
    width = tokens.stop - tokens.start
    scores.view(width, -1, tokens.stop)[:, :, tokens.start :] += unseen[:width, :, :width]
    return torch.softmax(scores, -1)


def _unseen(size: int) -> Tensor:
    """[size, 1, size], added to the scores of a block's own tokens."""
    return torch.full((size, size), -math.inf).triu_(1)[:, None]


class _Causal(torch.autograd.Function):
    """q [B, T, H, Dh], k and v [B, T, K, Dh] -> [B, T, H, Dh]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        width, size = q.shape[-1], _size(q, k)
        out, unseen = torch.empty(q.shape, dtype=q.dtype), _unseen(size)
        queries = q.float() * width**-0.5
        keys, values = k.transpose(1, 2).float().contiguous(), v.transpose(1, 2).contiguous()  # [B, K, T, Dh]
        for row, tokens, heads, head in _blocks(q, k, size):
            seen = row, head, slice(tokens.stop)
            p = _probabilities(queries[row, tokens, heads].reshape(-1, width), keys[seen], tokens, unseen)
            attended = product(p.to(v.dtype), values[seen].t())
            out[row, tokens, heads] = attended.view(-1, heads.stop - heads.start, width)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        width, size = q.shape[-1], _size(q, k)
        scale, unseen = width**-0.5, _unseen(size)
        grad_q = torch.empty(q.shape, dtype=q.dtype)
        # sums over blocks, [B, K, Dh, T]
        grad_k, grad_v = (torch.zeros(len(k), k.shape[2], width, k.shape[1]) for _ in range(2))
        queries, keys = q.float() * scale, k.transpose(1, 2).contiguous()
        wide_keys, wide_values = keys.float(), v.transpose(1, 2).float().contiguous()
        for row, tokens, heads, head in _blocks(q, k, size):
            seen, sums = (row, head, slice(tokens.stop)), (row, head, slice(None), slice(tokens.stop))
            d_out = grad[row, tokens, heads].reshape(-1, width)
            p = _probabilities(queries[row, tokens, heads].reshape(-1, width), wide_keys[seen], tokens, unseen)
            grad_v[sums] += weight_gradient(d_out, p.to(q.dtype))
            d_p = product(d_out.float(), wide_values[seen])
            d_scores = torch._softmax_backward_data(d_p, p, -1, p.dtype).to(q.dtype)
            grad_k[sums] += weight_gradient(q[row, tokens, heads].reshape(-1, width), d_scores)
            d_q = product(d_scores, keys[seen].t())
            torch.mul(d_q.view(-1, heads.stop - heads.start, width), scale, out=grad_q[row, tokens, heads])
        grad_k *= scale
        grad_k, grad_v = (t.permute(0, 3, 1, 2).to(k.dtype) for t in (grad_k, grad_v))
        return grad_q, grad_k, grad_v
