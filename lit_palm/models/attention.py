"""Who attends to whom: masks over rows, and attention within the documents of packed rows.

With a mask over whole rows all T^2 pairs of tokens are computed and most are thrown away: of a row that packs n
documents of one length, n^2 blocks of pairs for n that count. On the host the documents, which lie one after the other,
are cut out instead, each gets causal attention of its own, and the results are joined again: it knows where documents
end without waiting, and its kernels start at once. Elsewhere rows are masked.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lit_palm.models.half import attend_at_once, attention

__all__ = ["Documents", "attend_within", "bias_of", "find_documents"]


class Documents(NamedTuple):
    """Where the documents of packed rows lie."""

    lengths: tuple[int, ...]
    """Tokens of each, over all rows one after the other; padding counts as a document."""


def find_documents(documents: Tensor) -> Documents | None:
    """Where the documents of rows lie.

    Args:
        documents: [B, T] long.

    Returns:
        None where they cannot be told on the host, or where one is in several pieces.
    """
    if not documents.is_cpu or type(documents) is not Tensor or documents.numel() == 0:
        return None
    changes = documents[:, 1:] != documents[:, :-1]
    if type(changes) is not Tensor:  # of a dry run: there are no values
        return None
    ordered = documents.sort(1).values
    if not torch.equal(changes.sum(1), (ordered[:, 1:] != ordered[:, :-1]).sum(1)):
        return None
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = changes
    starts = first.flatten().nonzero().squeeze(1)
    ends = torch.cat((starts[1:], starts.new_tensor([documents.numel()])))
    return Documents(tuple((ends - starts).tolist()))


def attend_within(q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float = 0.0) -> Tensor:
    """Causal attention of each token over its own document.

    Args:
        q: [B, T, H, Dh].
        k: [B, T, K, Dh], K a divisor of H.
        v: [B, T, K, Dh].
        documents: where they lie.
        dropout: dropped share of the attention weights.

    Returns:
        [B, T, H, Dh].
    """
    if (attended := attend_at_once(q, k, v, documents.lengths, dropout)) is not None:
        return attended
    grouped = k.shape[2] != q.shape[2]
    parts = (t.flatten(0, 1).split(documents.lengths) for t in (q, k, v))
    # one cut and one joining for all: slices would each give a gradient of the whole
    done = [
        attention(*(t.transpose(0, 1)[None] for t in part), is_causal=True, enable_gqa=grouped, dropout_p=dropout)
        for part in zip(*parts, strict=True)
    ]
    return torch.cat([part[0].transpose(0, 1) for part in done]).view(q.shape)


def bias_of(like: Tensor, past: int, mask: Tensor | None, documents: Tensor | None, kept: Tensor | None) -> Tensor:
    """What is added to attention scores: 0 where a token sees another, else -inf.

    Args:
        like: [B, T, D] the hidden states, for type and device.
        past: tokens before these, in a cache.
        mask: [B, T] bool, see `Network.forward`.
        documents: [B, T] long.
        kept: [B, past + T], the bias of what is in a cache, which knows all masks so far.

    Returns:
        [B or 1, 1, T, past + T].
    """
    width = like.shape[1]
    seen = torch.ones(width, past + width, dtype=torch.bool, device=like.device).tril(past)[None]
    if kept is not None:
        seen = seen & (kept[:, None] == 0)
    elif mask is not None:
        seen = seen & mask[:, None, :]
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    # padding sees itself: a softmax over nothing would be NaN
    torch.diagonal(seen, past, -2, -1).fill_(True)
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, -math.inf)[:, None]
