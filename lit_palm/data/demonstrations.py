"""Demonstrations for fine-tuning: prompts with the completions that people wrote.

    data = DemonstrationData(train="demos.jsonl", batch_size=16, max_length=512)

A row is `messages`, or `prompt` + `completion` (each a string or messages), or a `text` alone (its prompt is empty).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np

from lit_palm.data.base import TokenizedData
from lit_palm.data.cache import Columns, ColumnWriter
from lit_palm.data.conversations import Conversation, encode, split_key, turn, turn_texts
from lit_palm.data.faults import note, overlong_fault, report
from lit_palm.data.packing import Windows
from lit_palm.data.sources import Row
from lit_palm.data.tokenizers import Tokenizer

__all__ = ["DemonstrationData", "Overlong"]

Overlong = Literal["error", "drop", "truncate"]


class DemonstrationData(TokenizedData):
    """Conversations to imitate.

    Batches: `tokens`, `mask`, `loss_mask` [B, T]; packed also `documents` and `positions`, with T the maximal length.

    Args:
        max_length: longest conversation in tokens; None: the network's context.
        overlong: what to do with a longer one: stop with an error, drop it, or cut its end off (and drop it when no
            token to learn from remains). What was dropped or cut is counted in a warning, with the first few places.
        completion_only: learn from the completion (of `messages`: from what the assistant says) and its EOS only; off:
            from the prompt too.
        pack: several conversations in one row, none seeing another, instead of padding; needs `max_length`.
        kwargs: the arguments of `TokenizedData`.

    Raises:
        ValueError: when arguments do not fit together.
    """

    view = "demonstrations"

    def __init__(
        self,
        max_length: int | None = None,
        overlong: Overlong = "truncate",
        completion_only: bool = True,
        pack: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if max_length is not None and max_length < 2:
            raise ValueError(f"data.max_length is {max_length}; it must be at least 2")
        if pack and max_length is None:
            raise ValueError("data.pack needs data.max_length, the length of the packed rows")
        self.max_length = max_length
        self.overlong = overlong
        self.completion_only = completion_only
        self.pack = pack

    def arguments(self) -> dict[str, Any]:
        decided = {"overlong": self.overlong, "completion_only": self.completion_only}
        return {"max_length": self.longest, **decided, "places": True}  # older entries count faults without places

    @property
    def longest(self) -> int | None:
        """`max_length`, or the network's context."""
        return self.max_length or self.network_limit("context_length")

    def parse(self, rows: Iterator[Row]) -> Iterator[tuple[str, Conversation]]:
        for row in rows:
            conversation = _conversation(row)
            yield row.group or split_key(conversation.prompt, conversation.completion), conversation

    def texts(self, sample: Conversation) -> Iterable[str]:
        return turn_texts(sample.prompt) + turn_texts(sample.completion)

    def write(self, samples: list[Conversation], tokenizer: Tokenizer, writer: ColumnWriter) -> None:
        longest = self.longest
        for sample, (tokens, targets) in zip(samples, encode(tokenizer, samples), strict=True):
            if not self.completion_only:
                targets = [True] * len(tokens)
            if longest is not None and len(tokens) > longest:
                if self.overlong == "error":
                    raise ValueError(
                        f"{sample.where}: this conversation has {len(tokens)} tokens, more than data.max_length"
                        f" {longest}; raise it, or set data.overlong to drop or truncate"
                    )
                tokens, targets = tokens[:longest], targets[:longest]
                kept = self.overlong == "truncate" and any(targets[1:])
                note(writer, "overlong", "cut" if kept else "dropped", sample.where)
                if not kept:
                    continue
            writer.append("tokens", tokens, np.int32)
            writer.append("targets", targets, np.bool_)
            writer.append("lengths", [len(tokens)], np.int64)

    def elements(self, columns: Columns, tokenizer: Tokenizer) -> Windows:
        if self.max_length is not None:
            self.check_length(self.max_length, "max_length")
        report(columns, {"overlong": overlong_fault(self.longest)})
        lengths = np.asarray(columns.arrays["lengths"])
        return Windows(
            columns.arrays["tokens"],
            np.cumsum(lengths) - lengths,
            lengths,
            tokenizer.pad_id,
            columns.arrays["targets"],
            room=self.max_length if self.pack else None,
        )


def _conversation(row: Row) -> Conversation:
    if "messages" in row.columns:
        messages = turn(row, "messages")
        if isinstance(messages, str) or not any(m["role"] == "assistant" for m in messages):
            raise ValueError(f"{row.where}: 'messages' has no message of the role 'assistant' to learn from")
        return Conversation([], messages, row.where)
    if "text" in row.columns and not {"prompt", "completion"} & set(row.columns):
        return Conversation("", str(turn(row, "text")), row.where)
    return Conversation(turn(row, "prompt"), turn(row, "completion"), row.where)
