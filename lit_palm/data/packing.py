"""Rows out of flat token arrays: pieces of documents, packed into windows or padded, without a loop over tokens.

A *piece* is a run of at most `length` tokens of one document. A document that does not fit is split; each further piece
repeats the token before it as context, because the first token of a piece is never a target: so every token of a
document but its first is a target exactly once.

Packing is best-fit decreasing: pieces from long to short, each into the fullest window that still has room (Ding et
al. 2024, "Fewer Truncations Improve Language Modeling"). Tokens see only their own piece (`documents`), and positions
start at 0 in each.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lit_palm.types import Experience

__all__ = ["Windows", "pack", "split_documents"]

Ints = NDArray[np.int64]


def split_documents(lengths: Ints, longest: int) -> tuple[Ints, Ints]:
    """Split documents into pieces of at most `longest` tokens that overlap by one token.

    Args:
        lengths: tokens of each document, at least 1.
        longest: tokens of a piece, at least 2.

    Returns:
        Start of each piece in the concatenated documents, and its length.
    """
    assert longest >= 2
    counts = np.maximum(1, -(-(lengths - 1) // (longest - 1)))
    index = _ranges(counts)
    inside = index * (longest - 1)
    starts = np.repeat(np.cumsum(lengths) - lengths, counts) + inside
    return starts, np.minimum(np.repeat(lengths, counts) - inside, longest)


def pack(lengths: Ints, room: int) -> tuple[Ints, Ints]:
    """Best-fit decreasing bin packing.

    Args:
        lengths: length of each piece, from 1 to `room`.
        room: length of a window.

    Returns:
        order: the pieces, those of one window together, windows in the order of their first piece in the data.
        offsets: [windows + 1], window w holds order[offsets[w]:offsets[w + 1]].
    """
    open_windows: list[list[int]] = [[] for _ in range(room + 1)]  # by the room that is left
    any_open = 0  # bit r: there is a window with room r left
    window_of = np.empty(len(lengths), np.int64)
    count = 0
    longest_first = np.argsort(-lengths, kind="stable")
    for piece, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        fitting = any_open >> length
        if fitting:
            left = length + (fitting & -fitting).bit_length() - 1
            window = open_windows[left].pop()
            if not open_windows[left]:
                any_open &= ~(1 << left)
        else:
            left, window = room, count
            count += 1
        window_of[piece] = window
        left -= length
        if left:
            open_windows[left].append(window)
            any_open |= 1 << left
    first = np.full(count, len(lengths), np.int64)
    np.minimum.at(first, window_of, np.arange(len(lengths)))
    place = np.empty(count, np.int64)
    place[np.argsort(first)] = np.arange(count)
    window_of = place[window_of] if count else window_of
    order = np.argsort(window_of, kind="stable")
    sizes = np.bincount(window_of, minlength=count)
    return order, np.concatenate([[0], np.cumsum(sizes)])


class Windows:
    """Rows of tokens, each made of one or several pieces.

    Args:
        tokens: all tokens, flat.
        starts: [pieces] where each piece starts in `tokens`.
        lengths: [pieces] its length.
        pad_id: fills rows up.
        targets: which of `tokens` are learned from, flat; None: all. The first token of a piece never is.
        room: pack pieces into windows of this length; None: each piece is a row, padded to the longest of its batch.
        packed: what `pack` returned, where that is known already.
    """

    def __init__(
        self,
        tokens: NDArray[np.integer],
        starts: Ints,
        lengths: Ints,
        pad_id: int,
        targets: NDArray[np.bool_] | None = None,
        room: int | None = None,
        packed: tuple[Ints, Ints] | None = None,
    ) -> None:
        self.tokens, self.starts, self.lengths = tokens, starts, lengths
        self.pad_id, self.targets, self.room = pad_id, targets, room
        if packed is not None:
            self.order, self.offsets = packed
        elif room is None:
            self.order, self.offsets = np.arange(len(lengths)), np.arange(len(lengths) + 1)
        else:
            self.order, self.offsets = pack(lengths, room)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def element_lengths(self) -> Ints | None:
        """[rows] tokens of each row; None when rows are packed, and so all of one length."""
        return np.asarray(self.lengths) if self.room is None else None

    def collate(self, rows: Ints, blank: bool = False) -> Experience:
        """A batch of rows.

        Args:
            rows: [B] which rows.
            blank: without weight: `loss_mask` all False.

        Returns:
            tokens, mask, loss_mask [B, T]; packed also positions and documents, with T always the window's length.
        """
        counts = self.offsets[rows + 1] - self.offsets[rows]
        number = _ranges(counts)  # of each piece in its row
        pieces = self.order[np.repeat(self.offsets[rows], counts) + number]
        row_of_piece = np.repeat(np.arange(len(rows)), counts)
        lengths = self.lengths[pieces]
        widths = np.bincount(row_of_piece, weights=lengths, minlength=len(rows)).astype(np.int64)

        inside = _ranges(lengths)  # of each token in its piece
        source = np.repeat(self.starts[pieces], lengths) + inside
        row, column = np.repeat(row_of_piece, lengths), _ranges(widths)
        shape = (len(rows), self.room or int(widths.max(initial=0)))

        tokens = np.full(shape, self.pad_id, np.int64)
        tokens[row, column] = self.tokens[source]
        mask = np.arange(shape[1]) < widths[:, None]
        loss_mask = np.zeros(shape, np.bool_)
        if not blank:
            loss_mask[row, column] = (inside > 0) & (True if self.targets is None else self.targets[source])
        fields = {"tokens": tokens, "mask": mask, "loss_mask": loss_mask}
        if self.room is not None:
            fields["positions"], fields["documents"] = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
            fields["positions"][row, column] = inside
            fields["documents"][row, column] = np.repeat(number, lengths)
        return Experience({name: torch.from_numpy(array) for name, array in fields.items()})


def _ranges(counts: Ints) -> Ints:
    """range(c) for each count, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
