"""Human preferences: which of several answers to a prompt people liked better.

    data = PreferenceData(train="pairs.jsonl", batch_size=32, max_length=512)

The columns of the first row decide the format, preference_formats.py lists them. A batch holds `batch_size` prompts
with all their answers: the answers to one prompt are consecutive rows of one `group`, so that a ranking stays one
element, as in InstructGPT (Ouyang et al. 2022, section 3.5).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lit_palm.data.base import TokenizedData
from lit_palm.data.cache import Columns, ColumnWriter
from lit_palm.data.conversations import Conversation, Encoded, encode, turn_texts
from lit_palm.data.demonstrations import Overlong, warn_overlong
from lit_palm.data.packing import Windows
from lit_palm.data.preference_formats import Group, groups
from lit_palm.data.sources import Row
from lit_palm.data.tokenizers import Tokenizer
from lit_palm.types import Experience

__all__ = ["PreferenceData", "PreferenceRows"]

_FIELDS = {"rank": np.int64, "rating": np.float32, "margin": np.float32}


class PreferenceRows:
    """Prompts with their answers, from the cache.

    Args:
        columns: from the cache.
        pad_id: fills rows up.
    """

    def __init__(self, columns: Columns, pad_id: int) -> None:
        arrays = columns.arrays
        lengths = np.asarray(arrays["lengths"])
        self.rows = Windows(arrays["tokens"], np.cumsum(lengths) - lengths, lengths, pad_id, arrays["targets"])
        self.offsets = np.concatenate([[0], np.cumsum(arrays["sizes"])])
        self.fields = {name: np.asarray(arrays[name]) for name in _FIELDS if name in arrays}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def element_lengths(self) -> NDArray[np.int64]:
        """[prompts] tokens of the longest answer, with its prompt."""
        return np.maximum.reduceat(self.rows.lengths, self.offsets[:-1])

    def collate(self, elements: NDArray[np.int64], blank: bool = False) -> Experience:
        """A batch of prompts with all their answers.

        Args:
            elements: which prompts.
            blank: one row without weight: alone in its group, `loss_mask` all False.

        Returns:
            tokens, mask, loss_mask [B, T], group [B], and rank, rating, margin [B] where the data has them.
        """
        ranges = [np.arange(self.offsets[e], self.offsets[e + 1]) for e in elements.tolist()]
        rows = np.concatenate(ranges)[: 1 if blank else None]
        batch = self.rows.collate(rows, blank)
        group = np.repeat(elements, [len(r) for r in ranges])[: len(rows)]
        batch["group"] = torch.from_numpy(group.astype(np.int64))
        for name, values in self.fields.items():
            batch[name] = torch.from_numpy(values[rows])
        return batch


class PreferenceData(TokenizedData):
    """Pairs, rankings or ratings of answers.

    Batches: `tokens`, `mask`, `loss_mask` [B, T] (the answer's tokens), `group` [B], and `rank` (pairs and rankings),
    `margin` (where pairs have one) or `rating` [B]. The last real token of a row is its EOS, where a reward is read.

    Args:
        max_length: longest prompt with answer in tokens; None: the network's context.
        overlong: what to do with a longer one: stop with an error, drop the prompt with its answers, or cut the
            beginning of the prompt off, alike for all its answers (and drop it when an answer alone is too long).
        kwargs: the arguments of `TokenizedData`; `batch_size` counts prompts.

    Raises:
        ValueError: when an argument is out of range.
    """

    def __init__(self, max_length: int | None = None, overlong: Overlong = "truncate", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if max_length is not None and max_length < 2:
            raise ValueError(f"data.max_length is {max_length}; it must be at least 2")
        self.max_length = max_length
        self.overlong = overlong

    def arguments(self) -> dict[str, Any]:
        return {"max_length": self.longest, "overlong": self.overlong}

    @property
    def longest(self) -> int | None:
        """`max_length`, or the network's context."""
        return self.max_length or self.network_limit("context_length")

    def parse(self, rows: Iterator[Row]) -> Iterator[tuple[str, Group]]:
        return ((group.key, group) for group in groups(rows))

    def texts(self, sample: Group) -> Iterable[str]:
        answers = [text for answer in sample.answers for text in turn_texts(answer.completion)]
        return turn_texts(sample.prompt) + answers

    def write(self, samples: list[Group], tokenizer: Tokenizer, writer: ColumnWriter) -> None:
        flat = [Conversation(g.prompt, a.completion, g.where) for g in samples for a in g.answers]
        encoded = iter(encode(tokenizer, flat))
        for group in samples:
            rows = [_until_eos(next(encoded), tokenizer.eos_id) for _ in group.answers]
            fitted = self._fit(group, rows, len(tokenizer.prefix), writer)
            if not fitted:
                continue
            writer.append("sizes", [len(fitted)], np.int64)
            for answer, (tokens, targets) in zip(group.answers, fitted, strict=True):
                writer.append("tokens", tokens, np.int32)
                writer.append("targets", targets, np.bool_)
                writer.append("lengths", [len(tokens)], np.int64)
                for name, kind in _FIELDS.items():
                    value = getattr(answer, name)
                    if value is not None:
                        writer.append(name, [value], kind)

    def _fit(self, group: Group, rows: list[Encoded], prefix: int, writer: ColumnWriter) -> list[Encoded]:
        """The rows of a group cut to the maximal length, none when it is dropped."""
        longest = self.longest
        excess = max(len(r.tokens) for r in rows) - (longest or 0)
        if longest is None or excess <= 0:
            return rows
        if self.overlong == "error":
            raise ValueError(
                f"{group.where}: an answer with its prompt has {excess + longest} tokens, more than data.max_length"
                f" {longest}; raise it, or set data.overlong to drop or truncate"
            )
        prompt = min(r.targets.index(True) if True in r.targets else len(r.targets) for r in rows) - prefix
        kept = self.overlong == "truncate" and excess <= prompt
        name = "truncated" if kept else "dropped"
        writer.meta[name] = writer.meta.get(name, 0) + 1
        end = prefix + excess
        return [Encoded(t[:prefix] + t[end:], m[:prefix] + m[end:]) for t, m in rows] if kept else []

    def elements(self, columns: Columns, tokenizer: Tokenizer) -> PreferenceRows:
        if self.max_length is not None:
            self.check_length(self.max_length, "max_length")
        warn_overlong(columns, self.longest)
        return PreferenceRows(columns, tokenizer.pad_id)


def _until_eos(row: Encoded, eos_id: int) -> Encoded:
    """The row up to its last EOS: some templates write a line break after it, which no sampled completion has."""
    end = len(row.tokens) - row.tokens[::-1].index(eos_id)
    return Encoded(row.tokens[:end], row.targets[:end])
