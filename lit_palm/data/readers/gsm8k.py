"""Word problems of primary school with worked solutions (Cobbe et al. 2021, "Training Verifiers to Solve Math Word
Problems")."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal

from lit_palm.data.readers.base import Drop, Reader, View, user
from lit_palm.data.readers.places import Hub
from lit_palm.data.sources import Row
from lit_palm.data.templates import Message

__all__ = ["GSM8K"]

_FINAL = re.compile(r"#### (-?[0-9.,]+)")
_CALCULATION = re.compile(r"<<[^<>]*>>")


class GSM8K(Reader):
    """openai/gsm8k: a `question`, and an `answer` that works it out and ends in "#### 42".

    prompts: the question, with the final number in the column `answer` and the whole solution in `solution`; the reward
    `GSM8KAnswer` checks completions against it. demonstrations: the solution.

    Args:
        part: main, or socratic, whose solutions ask themselves questions.
        calculator: leave the calculator's notes in solutions, "48/2 = <<48/2=24>>24"; off: "48/2 = 24".
        system: a system message before every question, such as how to write the final answer.
        chat: messages for the chat template; off: "Question: ...\\nAnswer:" with the solution after it.

    Raises:
        ValueError: when a system message has no template to go through.
    """

    def __init__(
        self,
        part: Literal["main", "socratic"] = "main",
        calculator: bool = False,
        system: str | None = None,
        chat: bool = True,
    ) -> None:
        if system is not None and not chat:
            raise ValueError("data.reader.system is a message, so it needs data.reader.chat")
        self.part, self.calculator, self.system, self.chat = part, calculator, system, chat

    @property
    def hub(self) -> Hub:
        return Hub("openai/gsm8k", config=self.part)

    def splits(self, view: View) -> Mapping[str, str]:
        return {"train": "train", "validation": "test", "test": "test"}

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row in rows:
            solution, final = self._solution(row)
            question = self.field(row, "question", str)
            yield Row(row.where, {"prompt": self._prompt(question), "answer": final, "solution": solution}, question)

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row in rows:
            solution, _ = self._solution(row)
            question = self.field(row, "question", str)
            completion = [{"role": "assistant", "content": solution}] if self.chat else " " + solution
            yield Row(row.where, {"prompt": self._prompt(question), "completion": completion}, question)

    def _prompt(self, question: str) -> str | list[Message]:
        return user(question, self.system) if self.chat else f"Question: {question}\nAnswer:"

    def _solution(self, row: Row) -> tuple[str, str]:
        """The solution, and the number it ends in without thousands separators."""
        text = self.field(row, "answer", str)
        finals = _FINAL.findall(text)
        if not finals:
            raise self.off(row, "answer", str, f"does not end in '#### NUMBER' ({text[-40:]!r})")
        return (text if self.calculator else _CALCULATION.sub("", text)), finals[-1].replace(",", "")
