"""Instructions with answers that a model wrote: Alpaca (Taori et al. 2023) and conversations of ShareGPT."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

from lit_palm.data.readers.base import Drop, Reader, View, distinct, user
from lit_palm.data.readers.places import Hub
from lit_palm.data.sources import Row
from lit_palm.data.templates import Message

__all__ = ["Alpaca", "ShareGPT"]

# the prompts that Alpaca was trained with
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


class Alpaca(Reader):
    """tatsu-lab/alpaca, and whatever else has `instruction`, `input` and `output`.

    demonstrations: the instruction, with its input, and the output. prompts: without it. The dataset has no validation
    split: set `data.validation_fraction`.

    Args:
        chat: messages for the chat template; off: the text that Alpaca was trained with ("### Instruction: ...").
    """

    def __init__(self, chat: bool = True) -> None:
        self.chat = chat

    @property
    def hub(self) -> Hub:
        return Hub("tatsu-lab/alpaca")

    def splits(self, view: View) -> Mapping[str, str]:
        return {"train": "train"}

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row in rows:
            prompt, output = self._prompt(row), self.field(row, "output", str)
            if not output.strip():
                drop(row, "the output is empty")
                continue
            answer = [{"role": "assistant", "content": output}] if self.chat else "\n" + output
            yield Row(row.where, {"prompt": prompt, "completion": answer})

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        yield from distinct((Row(row.where, {"prompt": self._prompt(row)}) for row in rows), drop)

    def _prompt(self, row: Row) -> str | list[Message]:
        instruction, given = self.field(row, "instruction", str), self.field(row, "input", str, null=True) or ""
        if self.chat:
            return user(f"{instruction}\n\n{given}" if given else instruction)
        return (_WITH_INPUT if given else _WITHOUT).format(instruction=instruction, input=given)


class ShareGPT(Reader):
    """Conversations as ShareGPT exports them: `conversations`, a list of `from` (human, gpt, system) and `value`.

    demonstrations: the whole conversation. prompts: up to the first answer. What the assistant says before anybody
    asked is cut off (long conversations were published in pieces). The dataset has no validation split: set
    `data.validation_fraction`.

    Args:
        system: take system messages along; off: without them.
    """

    _FROM = {
        "human": "user", "user": "user",
        "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "bing": "assistant", "bard": "assistant",
        "system": "system",
    }  # fmt: skip

    def __init__(self, system: bool = True) -> None:
        self.system = system

    @property
    def hub(self) -> Hub:
        return Hub("anon8231489123/ShareGPT_Vicuna_unfiltered", data_files="ShareGPT_V3_unfiltered_cleaned_split.json")

    def splits(self, view: View) -> Mapping[str, str]:
        return {"train": "train"}

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row, messages in self._read(rows, drop):
            if messages[-1]["role"] != "assistant":
                messages = messages[:-1]
            if any(message["role"] == "assistant" for message in messages):
                yield Row(row.where, {"messages": messages})
            else:
                drop(row, "the assistant says nothing")

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        yield from distinct((Row(row.where, {"prompt": _question(m)}) for row, m in self._read(rows, drop)), drop)

    def _read(self, rows: Iterator[Row], drop: Drop) -> Iterator[tuple[Row, list[Message]]]:
        for row in rows:
            messages = [self._message(row, i) for i in range(len(self.field(row, "conversations", list)))]
            before = [m for m in messages[:1] if m["role"] == "system"]
            turns = [m for m in messages if m["role"] != "system"]
            while turns and turns[0]["role"] == "assistant":
                turns = turns[1:]
            if not turns:
                drop(row, "the conversation has no human")
            elif any(a["role"] == b["role"] for a, b in pairwise(turns)):
                drop(row, "one speaker has two turns in a row")
            elif len(before) < sum(m["role"] == "system" for m in messages):
                drop(row, "a system message is not the first")
            elif any(not m["content"].strip() for m in turns):
                drop(row, "a turn is empty")
            else:
                yield row, [*(before if self.system else ()), *turns]

    def _message(self, row: Row, number: int) -> Message:
        speaker = self.field(row, f"conversations[{number}].from", str)
        if speaker not in self._FROM:
            known = ", ".join(self._FROM)
            raise self.off(row, f"conversations[{number}].from", str, f"is {speaker!r}, none of {known}")
        return {"role": self._FROM[speaker], "content": self.field(row, f"conversations[{number}].value", str)}


def _question(messages: list[Message]) -> list[Message]:
    end = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    return messages[:end]
