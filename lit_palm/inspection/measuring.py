"""What there is to say about the data of a stage: counts, lengths, what is left out, and the batches themselves.

Texts are counted as the data module parses them. Where there is a tokenizer, the rows are then tokenised as a run does
it (into the same cache, so that the run itself starts sooner), and the rows that are shown come from the batches that
it would train on.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_palm.data.base import Stage, TokenizedData
from lit_palm.data.conversations import Conversation, Turn, turn_texts
from lit_palm.data.faults import counted
from lit_palm.data.packing import Windows
from lit_palm.data.preference_formats import Group
from lit_palm.data.preferences import PreferenceRows
from lit_palm.data.prompts import PromptRows
from lit_palm.data.tokenizers import Tokenizer

__all__ = ["Inspection", "Lengths", "Segment"]


class Lengths(NamedTuple):
    """Lengths of one kind of text or row."""

    least: int
    median: int
    p95: int
    most: int

    @classmethod
    def of(cls, values: Sequence[int] | NDArray[Any]) -> Lengths:
        """Percentiles are values that occur."""
        ordered = np.sort(np.asarray(values))
        return cls(*(int(ordered[min(int(q * len(ordered)), len(ordered) - 1)]) for q in (0, 0.5, 0.95, 1)))


class Segment(NamedTuple):
    """A stretch of a row's text, and whether it is learned from."""

    text: str
    learned: bool


class Inspection:
    """The data of a stage.

    Args:
        data: the data module as configured.
        module: the LightningModule that would train on it, without networks; None: there is none.
        stage: which data.

    Raises:
        ValueError: for every fault that would stop a run, as the run would say it.
    """

    def __init__(self, data: Any, module: Any, stage: Stage) -> None:
        if not isinstance(data, TokenizedData):
            raise ValueError(f"{type(data).__name__} cannot be inspected: it is none of lit_palm's data modules")
        if type(data).__name__ == "StreamingTextData" and stage == "train":
            raise ValueError(
                "StreamingTextData is read while training: inspect one of its sources with --data=TextData, or its"
                " validation data with --stage validation"
            )
        if data.sources[stage][0] is None:
            raise ValueError(f"data.{stage} is not set: name a file, folder, glob, URL or hub dataset")
        self.data, self.stage = data, stage
        self.notes: list[str] = []
        left_out: dict[str, Any] = {}
        self.samples: list[Any] = []  # the first ones, for where there is no tokenizer
        self.num_samples = self.num_answers = 0
        self._chars: dict[str, list[int]] = {}
        for sample in data.samples(stage, left_out):
            self.num_samples += 1
            self.num_answers += len(sample.answers) if isinstance(sample, Group) else 0
            for name, texts in _texts(sample).items():
                self._chars.setdefault(name, []).extend(sum(map(len, text)) for text in texts)
            if len(self.samples) < 100:
                self.samples.append(sample)
        self.left_out = counted(left_out)
        self.faults: list[str] = []
        self.tokenizer = self._find_tokenizer(module)
        self.elements: Any = None
        self.error: ValueError | None = None
        """What stops a run once its rows are tokens, such as one that is too long; counts and characters are known."""
        if self.tokenizer is not None:
            try:
                self.elements = self._tokenised()
            except ValueError as error:
                self.error = error

    # ---- what is said

    @property
    def rows_read(self) -> int:
        """Rows of the source."""
        return self.data.rows_read.get(self.stage, 0)

    @property
    def limit(self) -> int | None:
        """Longest row in tokens, where data module or network say."""
        for name in ("sequence_length", "max_length", "max_prompt_length"):
            if getattr(self.data, name, None) is not None:
                return int(getattr(self.data, name))
        return self.data.network_limit("context_length")

    def characters(self) -> dict[str, Lengths]:
        """Lengths of prompts, answers and so on."""
        return {name: Lengths.of(values) for name, values in self._chars.items()}

    def tokens(self) -> dict[str, Lengths]:
        """Lengths of the rows that are trained on; empty without a tokenizer."""
        if self.elements is None:
            return {}
        if isinstance(self.elements, PromptRows):
            return {"prompt": Lengths.of(self.elements.lengths)}
        rows = self.elements.rows if isinstance(self.elements, PreferenceRows) else self.elements
        assert isinstance(rows, Windows)
        found = {"row": Lengths.of(rows.lengths)}
        if rows.targets is not None:
            ends = np.add.reduceat(np.asarray(rows.targets, np.int64), rows.starts)
            found["learned from"] = Lengths.of(ends)
        return found

    def rows(self, count: int) -> list[dict[str, Any]]:
        """The first elements as they are trained on: `segments` of text, and what is known of them besides."""
        if self.elements is None:
            return [_plain(sample) for sample in self.samples[:count]]
        if isinstance(self.elements, PromptRows):
            return [
                {"segments": [Segment(row["prompt"], False)], **_others(row["columns"])}
                for row in self.elements[:count]
            ]
        shown = np.arange(min(count, len(self.elements)))
        batch = self.elements.collate(shown)
        result = []
        for i, (tokens, mask, learned) in enumerate(zip(batch.tokens, batch.mask, batch.loss_mask, strict=True)):
            known = {"prompt": int(batch["group"][i])} if "group" in batch else {}
            for name in ("rank", "margin", "rating", "label"):
                if name in batch:
                    known[name] = batch[name][i].item()
            segments = self._segments(tokens[mask].tolist(), learned[mask].tolist())
            result.append({"segments": segments, **known})
        return result

    def record(self, count: int) -> dict[str, Any]:
        """All of it as JSON values."""
        source, split = self.data.sources[self.stage]
        return {
            "data": type(self.data).__name__,
            "reader": None if self.data.reader is None else type(self.data.reader).__name__,
            "stage": self.stage,
            "source": source,
            "split": split,
            "rows_read": self.rows_read,
            "used": self.num_samples,
            "answers": self.num_answers or None,
            "rows_trained_on": None if self.elements is None else len(self.elements),
            "left_out": self.left_out,
            "faults": self.faults,
            "characters": {name: found._asdict() for name, found in self.characters().items()},
            "tokens": {name: found._asdict() for name, found in self.tokens().items()},
            "limit": self.limit,
            "tokenizer": None if self.tokenizer is None else type(self.tokenizer).__name__,
            "notes": self.notes,
            "error": None if self.error is None else str(self.error),
            "rows": [
                {**row, "segments": [{"text": s.text, "learned": s.learned} for s in row["segments"]]}
                for row in self.rows(count)
            ],
        }

    # ---- how it is found

    def _find_tokenizer(self, module: Any) -> Tokenizer | None:
        if module is not None:
            try:
                module.load_tokenizer()
                module.context_length  # noqa: B018 - read from the checkpoint, which may not be there
                self.data.bind(module)
            except (ValueError, OSError) as error:
                self.notes.append(f"model.network is left aside: {error}")
        given = self.data.tokenizer
        if isinstance(given, Tokenizer) and not given.trained:
            self.notes.append("data.tokenizer is not trained yet, which a run does: lengths are in characters")
            return None
        if given is None and getattr(self.data.bound, "tokenizer", None) is None:
            self.notes.append("there is no tokenizer: name one with --data.tokenizer to see tokens and the loss mask")
            return None
        return self.data.find_tokenizer()

    def _tokenised(self) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            elements = self.data.ready(self.stage, self.data.tokenizer)
        for warning in caught:
            title, *lines = str(warning.message).splitlines()
            if title == "the data has rows with faults":
                self.faults += [line.strip() for line in lines]
        return elements

    def _segments(self, tokens: list[int], learned: list[bool]) -> list[Segment]:
        """Stretches of tokens that are alike, as text; special tokens are shown."""
        assert self.tokenizer is not None
        edges = [0, *(i for i in range(1, len(tokens)) if learned[i] != learned[i - 1]), len(tokens)]
        return [
            Segment(self.tokenizer.decode(tokens[a:b], skip_special=False), learned[a])
            for a, b in pairwise(edges)
            if a < b
        ]


def _texts(sample: Any) -> dict[str, list[list[str]]]:
    """The texts of a sample by what they are, each as its pieces."""
    if isinstance(sample, Group):
        return {"prompt": [turn_texts(sample.prompt)], "answer": [turn_texts(a.completion) for a in sample.answers]}
    if isinstance(sample, Conversation):
        if not sample.prompt:
            return {"conversation": [turn_texts(sample.completion)]}
        return {"prompt": [turn_texts(sample.prompt)], "completion": [turn_texts(sample.completion)]}
    if hasattr(sample, "prompt"):
        return {"prompt": [turn_texts(sample.prompt)]}
    return {"document": [[sample.text]]} if sample.text is not None else {}


def _plain(sample: Any) -> dict[str, Any]:
    """A sample without a tokenizer and its template: who says what."""
    if isinstance(sample, Group):
        answers = [[*_turns(answer.completion, True), Segment("\n", False)] for answer in sample.answers]
        ranks = {"rank": [answer.rank for answer in sample.answers]} if sample.answers[0].rank is not None else {}
        return {"segments": [*_turns(sample.prompt, False), *(s for a in answers for s in a)], **ranks}
    if isinstance(sample, Conversation):
        return {"segments": [*_turns(sample.prompt, False), *_turns(sample.completion, True)]}
    if hasattr(sample, "prompt"):
        return {"segments": _turns(sample.prompt, False), **_others(sample.columns)}
    return {"segments": [Segment(sample.text or str(sample.tokens), True)]}


def _others(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns of a prompt that are not the prompt."""
    return {name: value for name, value in columns.items() if name not in ("prompt", "messages", "segments")}


def _turns(turn: Turn, learned: bool) -> list[Segment]:
    """A string, or a line for each message; of what is learned from, what the assistant says."""
    if isinstance(turn, str):
        return [Segment(turn, learned)] if turn else []
    lines = []
    for message in turn:
        lines.append(Segment(f"{message['role']}: ", False))
        lines.append(Segment(str(message["content"]), learned and message["role"] == "assistant"))
        lines.append(Segment("\n", False))
    return lines
