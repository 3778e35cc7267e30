"""Rows without their padding, and the prompt that several of them begin with only once.

Of rows of different lengths a network need not compute the padding, and of rows of one `group`, which begin with the
same prompt, it need compute the prompt only once: a causal network gives it the same hidden states in each. So their
tokens are laid side by side, each once,

    prompt | what follows it in row 1 | what follows it in row 2 | prompt | ...

and everything that treats tokens alone (embedding, norms, projections, feed-forward) runs on these. Attention alone
needs whole rows: `spread` copies keys and values to where they belong and `put` queries, plain causal attention runs
on rows as they were, and `collect` takes back one result for each token. The log-probabilities are those of separate
rows (up to rounding). Preferences (DPO) and samples (PPO, GRPO) are such rows.

The network's result is read only where a target follows. Such tokens come first, so that its last block can leave the
others, prompts for the most part, with their keys and values; a row's last target, which nothing follows, is left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from lit_palm.models.attention import Documents
from lit_palm.types import sent

__all__ = ["Seen", "Sequences", "SideBySide", "collect", "put", "side_by_side", "spread"]

WORTHWHILE = 0.96
"""Lay side by side when at most this share of the padded tokens is left: copying to and fro costs a little."""

KEYS_AND_VALUES = 0.05
"""What a token costs in a block that computes nothing else of it, in tokens."""


class Sequences(NamedTuple):
    """How N tokens make up B rows of T."""

    place: Tensor
    """[B, T] long: which of the N tokens stands here; on padding 0, which no real token sees."""
    home: Tensor
    """[N] long: where in the flattened rows each token's own result is taken from."""
    shared: Tensor
    """[P] long: which of the N tokens stand in several rows."""
    copies: Tensor
    """[P, K] long: where in the flattened rows each of these stands; -1 where it stands in fewer than K."""
    read: int | None = None
    """The network is to give the hidden states of so many tokens, the first ones; None: of all."""

    def whole(self) -> Sequences:
        """The same, for what gives the hidden states of all tokens."""
        return self._replace(read=None)

    def to(self, device: torch.device) -> Sequences:
        """The same on a device."""
        place, home, shared, copies = (sent(t, device) for t in self[:4])
        return Sequences(place, home, shared, copies, self.read)


Seen = Tensor | Documents | BlockMask | Sequences | None
"""What attention is told that a token sees: a bias [B, 1, T, S] on its scores, where its documents lie, or that it
belongs to rows; None: what comes before it."""


class SideBySide(NamedTuple):
    """B rows of T tokens as N tokens."""

    tokens: Tensor
    """[1, N] long."""
    positions: Tensor
    """[1, N] long."""
    sequences: Sequences
    source: Tensor
    """[B, T] long: which of the N tokens each token of the rows is predicted from; of a target one that is read."""


def side_by_side(
    tokens: Tensor,
    mask: Tensor,
    targets: Tensor,
    group: Tensor,
    depth: int | None = None,
    device: torch.device | None = None,
) -> SideBySide | None:
    """Lay rows side by side.

    The indices are made on the host; rows on another device are waited for.

    Args:
        tokens: [B, T] long, right-padded.
        mask: [B, T] bool, True where a token is real.
        targets: [B, T] bool, the tokens to be predicted; what comes before a row's first one is its prompt.
        group: [B] long.
        depth: blocks of the network, if only what targets are predicted from is read; None: all tokens are.
        device: of the result; None: of the rows.

    Returns:
        What stands for them; None when it does not pay.
    """
    device = device or tokens.device
    tokens, mask, targets, group = (t.cpu() for t in (tokens, mask, targets, group))
    rows, width = tokens.shape
    _, which, sizes = group.unique(return_inverse=True, return_counts=True)
    place = torch.arange(width)
    by_group = which.argsort(stable=True)
    first_row = sizes.cumsum(0) - sizes
    leader = by_group[first_row][which]
    # what a group shares: the tokens all of its rows begin with, none of which is a target
    same = ((tokens == tokens[leader]) & mask & ~targets).long().cumprod(1).sum(1)
    common = torch.full_like(sizes, width).scatter_reduce(0, which, same, "amin")[which]
    copied = (place < common[:, None]) & (leader != torch.arange(rows))[:, None]
    own = mask & ~copied
    if depth is not None:  # nothing is read from a row's last target, nor after it
        needed = (targets * place).amax(1)
        needed = torch.where((sizes > 1)[which], torch.maximum(needed, common), needed)
        own &= place < needed[:, None]
    home = own.flatten().nonzero().squeeze(1)
    number = _numbered(home, copied, leader)
    read, cost = None, float(len(home))
    if depth is not None:
        wanted = torch.zeros(len(home), dtype=torch.bool)
        wanted[number[:, :-1][targets[:, 1:]]] = True
        read = max(1, int(wanted.sum()))
        cost -= (len(home) - read) * (1 - KEYS_AND_VALUES) / depth
        home = home[(~wanted).long().argsort(stable=True)]
        number = _numbered(home, copied, leader)
    if not len(home) or cost > WORTHWHILE * rows * width:
        return None
    sequences = Sequences(number, home, *_copies(number, common, by_group, first_row, sizes), read)
    return SideBySide(
        tokens=sent(tokens.flatten()[home][None], device),
        positions=sent((home % width)[None], device),
        sequences=sequences.to(device),
        source=sent(number.roll(1, dims=1), device),
    )


def _numbered(home: Tensor, copied: Tensor, leader: Tensor) -> Tensor:
    """[B, T] which of the N tokens, whose places are given, stands here: a row's own, or one of its group's leader."""
    number = torch.zeros(copied.numel(), dtype=torch.long)
    number[home] = torch.arange(len(home))
    number = number.view(copied.shape)
    return torch.where(copied, number[leader], number)


def _copies(
    number: Tensor, common: Tensor, by_group: Tensor, first_row: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """The last two fields of `Sequences`."""
    width, most = number.shape[1], int(sizes.max())
    member = torch.arange(most)
    # [groups, most] rows of each group; [groups, most, T] where each token of the prompt stands in them
    exists = member < sizes[:, None]
    row = by_group[(first_row[:, None] + member).clamp(max=len(by_group) - 1)]
    where = torch.where(exists[:, :, None], row[:, :, None] * width + torch.arange(width), -1)
    leader = by_group[first_row]
    repeated = (torch.arange(width) < common[leader][:, None]) & (sizes > 1)[:, None]
    return number[leader][repeated], where.transpose(1, 2)[repeated]


def spread(values: Tensor, sequences: Sequences) -> Tensor:
    """[1, N, ...] of the tokens -> [B, T, ...] of the rows."""
    rows = _Spread.apply(values[0], *sequences[:4])
    return rows.view(*sequences.place.shape, *values.shape[2:])  # type: ignore[no-any-return]


def put(values: Tensor, home: Tensor, sequences: Sequences) -> Tensor:
    """[1, N, ...] of the first N tokens, whose places are given -> [B, T, ...] of the rows, zero elsewhere."""
    shape = sequences.place.shape
    return _Put.apply(values[0], home, shape.numel()).view(*shape, *values.shape[2:])  # type: ignore[no-any-return]


def collect(values: Tensor, home: Tensor) -> Tensor:
    """[B, T, ...] of the rows -> [1, N, ...] of the tokens whose places are given."""
    return _Collect.apply(values.flatten(0, 1), home)[None]  # type: ignore[no-any-return]


class _Spread(torch.autograd.Function):
    """A token's gradient is the sum of its copies', in an order of its own: `index_add`, which autograd would take, is
    slow on a CPU, and on a GPU adds in any order, so that a resumed run would not be the same."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, place: Tensor, home: Tensor, shared: Tensor, copies: Tensor) -> Tensor:
        ctx.save_for_backward(home, shared, copies)
        return values.index_select(0, place.flatten())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        home, shared, copies = ctx.saved_tensors
        total = grad.index_select(0, home)
        if len(shared):
            parts = grad.index_select(0, copies.clamp(min=0).flatten()).view(*copies.shape, *grad.shape[1:])
            parts.masked_fill_((copies < 0).view(*copies.shape, *[1] * (grad.dim() - 1)), 0)
            total.index_copy_(0, shared, parts.sum(1))
        return total, None, None, None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, home: Tensor) -> Tensor:
        ctx.save_for_backward(home)
        ctx.rows = len(values)
        return values.index_select(0, home)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (home,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, home, grad), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, home: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(home)
        return values.new_zeros(rows, *values.shape[1:]).index_copy_(0, home, values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (home,) = ctx.saved_tensors
        return grad.index_select(0, home), None, None
