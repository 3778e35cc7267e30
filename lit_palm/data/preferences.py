"""Human preferences: which of several answers to a prompt people liked better, or whether they wanted an answer.

    data = PreferenceData(train="pairs.jsonl", batch_size=32, max_length=512)

The columns of the first row decide the format, preference_formats.py lists them. A batch holds `batch_size` prompts
with all their answers: the answers to one prompt are consecutive rows of one `group`, so that a ranking stays one
element, as in InstructGPT (Ouyang et al. 2022, section 3.5).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lit_palm.data.base import TokenizedData
from lit_palm.data.cache import Columns, ColumnWriter
from lit_palm.data.conversations import Conversation, Encoded, encode, turn_texts
from lit_palm.data.demonstrations import Overlong
from lit_palm.data.faults import note, overlong_fault, report
from lit_palm.data.mismatched import add_mismatched
from lit_palm.data.packing import Windows
from lit_palm.data.preference_checks import FAULTS, AnswerCheck, Faulty
from lit_palm.data.preference_formats import Answer, Group, groups
from lit_palm.data.sources import Row
from lit_palm.data.tokenizers import Tokenizer
from lit_palm.types import Experience

__all__ = ["PreferenceData", "PreferenceRows"]

_FIELDS = {"rank": np.int64, "rating": np.float32, "margin": np.float32, "label": np.bool_}


class PreferenceRows:
    """Prompts with their answers, from the cache.

    Args:
        columns: from the cache.
        pad_id: fills rows up.
        mismatched: also serve each prompt with another row's completion.
        longest: longest such row in tokens; None: any.
        prefix: tokens at the beginning of each prompt that always stay.
    """

    def __init__(
        self, columns: Columns, pad_id: int, mismatched: bool = False, longest: int | None = None, prefix: int = 0
    ) -> None:
        self.pad_id, self.mismatched, self.longest, self.prefix = pad_id, mismatched, longest, prefix
        arrays = columns.arrays
        lengths = np.asarray(arrays["lengths"])
        self.rows = Windows(arrays["tokens"], np.cumsum(lengths) - lengths, lengths, pad_id, arrays["targets"])
        self.offsets = np.concatenate([[0], np.cumsum(arrays["sizes"])])
        self.fields = {name: np.asarray(arrays[name]) for name in _FIELDS if name in arrays}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_rows(self) -> int:
        """Answers in all: `row` of a batch counts them from 0."""
        return len(self.rows)

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
            tokens, mask, loss_mask [B, T], group and row [B], and rank, rating, margin, label [B] where the data has
            them; with `mismatched` twice the rows, see `add_mismatched`.
        """
        ranges = [np.arange(self.offsets[e], self.offsets[e + 1]) for e in elements.tolist()]
        rows = np.concatenate(ranges)[: 1 if blank else None]
        batch = self.rows.collate(rows, blank)
        group = np.repeat(elements, [len(r) for r in ranges])[: len(rows)]
        batch["group"] = torch.from_numpy(group.astype(np.int64))
        batch["row"] = torch.full((len(rows),), -1) if blank else torch.from_numpy(rows)
        for name, values in self.fields.items():
            batch[name] = torch.from_numpy(values[rows])
        if self.mismatched:
            batch = add_mismatched(batch, self.rows, rows, self.pad_id, self.longest, self.prefix)
        return batch


class PreferenceData(TokenizedData):
    """Pairs, rankings or ratings of answers, or single answers that people wanted or not (unpaired feedback).

    Batches: `tokens`, `mask`, `loss_mask` [B, T] (the answer's tokens), `group` [B], `row` [B] (the answer's number
    among all that are used, -1 for one that only fills a batch up), and `rank` (pairs and rankings), `margin` (where
    pairs have one), `rating` or `label` [B]. The last real token of a row is its EOS, where a reward is read.

    Faulty rows are counted and reported in one warning with the places of the first few, also when the tokenised data
    comes from the cache. By default they are left out: two equal answers say nothing about which is better, yet a pair
    of them would count in the average (and pull on a margin); an empty answer is nearly always a mistake of an export,
    and as the chosen one teaches a policy to say nothing.

    Args:
        max_length: longest prompt with answer in tokens; None: the network's context.
        overlong: what to do with a longer one: stop with an error, drop the prompt with its answers, or cut the
            beginning of the prompt off, alike for all its answers (and drop it when an answer alone is too long).
        identical: what to do with equal answers of different rank: stop with an error, leave all of them out (and the
            prompt, when no two answers of different rank remain), or keep them. Equal answers of equal rank form no
            pair and stay.
        empty: what to do with answers of nothing but EOS or white space: stop with an error, leave them out (and the
            prompt, as above), or keep them.
        mismatched: for unpaired feedback, serve each prompt of a batch once more with the completion of the next row,
            marked in `mismatched` [B] (KTO estimates the divergence on them). These rows have `row` -1, and their label
            means nothing. A batch then has twice as many rows.
        kwargs: the arguments of `TokenizedData`; `batch_size` counts prompts.

    Raises:
        ValueError: when an argument is out of range.
    """

    view = "preferences"

    def __init__(
        self,
        max_length: int | None = None,
        overlong: Overlong = "truncate",
        identical: Faulty = "drop",
        empty: Faulty = "drop",
        mismatched: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_length is not None and max_length < 2:
            raise ValueError(f"data.max_length is {max_length}; it must be at least 2")
        self.max_length = max_length
        self.overlong = overlong
        self.identical, self.empty = identical, empty
        self.mismatched = mismatched

    def arguments(self) -> dict[str, Any]:
        decided = {"overlong": self.overlong, "identical": self.identical, "empty": self.empty}
        return {"max_length": self.longest, **decided}

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
        check = AnswerCheck(self.identical, self.empty, tokenizer, writer)
        for group in samples:
            rows = [_until_eos(next(encoded), tokenizer.eos_id) for _ in group.answers]
            answers = self._fit(group, check(group, rows), len(tokenizer.prefix), writer)
            if answers:
                _append(writer, answers)

    def _fit(
        self, group: Group, answers: list[tuple[Answer, Encoded]], prefix: int, writer: ColumnWriter
    ) -> list[tuple[Answer, Encoded]]:
        """The answers of a group, their rows cut to the maximal length; none when it is dropped."""
        longest = self.longest
        excess = max((len(row.tokens) for _, row in answers), default=0) - (longest or 0)
        if longest is None or excess <= 0:
            return answers
        if self.overlong == "error":
            raise ValueError(
                f"{group.where}: an answer with its prompt has {excess + longest} tokens, more than data.max_length"
                f" {longest}; raise it, or set data.overlong to drop or truncate"
            )
        prompt = min(r.targets.index(True) if True in r.targets else len(r.targets) for _, r in answers) - prefix
        kept = self.overlong == "truncate" and excess <= prompt
        note(writer, "overlong", "cut" if kept else "dropped", group.where)
        end = prefix + excess
        return [(a, Encoded(t[:prefix] + t[end:], m[:prefix] + m[end:])) for a, (t, m) in answers] if kept else []

    def elements(self, columns: Columns, tokenizer: Tokenizer) -> PreferenceRows:
        if self.max_length is not None:
            self.check_length(self.max_length, "max_length")
        report(columns, {**FAULTS, "overlong": overlong_fault(self.longest)})
        if self.mismatched and "label" not in columns.arrays:
            raise ValueError(
                "data.mismatched is for unpaired feedback, rows of prompt, completion and label; leave it out for"
                " pairs, rankings and ratings"
            )
        rows = PreferenceRows(columns, tokenizer.pad_id, self.mismatched, self.longest, len(tokenizer.prefix))
        if self.mismatched and len(rows) < 2:
            raise ValueError("data.mismatched needs the completion of another row, and the data has a single one")
        return rows


def _append(writer: ColumnWriter, answers: Sequence[tuple[Answer, Encoded]]) -> None:
    """Write one prompt with its answers."""
    writer.append("sizes", [len(answers)], np.int64)
    for answer, (tokens, targets) in answers:
        writer.append("tokens", tokens, np.int32)
        writer.append("targets", targets, np.bool_)
        writer.append("lengths", [len(tokens)], np.int64)
        for name, kind in _FIELDS.items():
            value = getattr(answer, name)
            if value is not None:
                writer.append(name, [value], kind)


def _until_eos(row: Encoded, eos_id: int) -> Encoded:
    """The row up to its last EOS: some templates write a line break after it, which no sampled completion has."""
    end = len(row.tokens) - row.tokens[::-1].index(eos_id)
    return Encoded(row.tokens[:end], row.targets[:end])
