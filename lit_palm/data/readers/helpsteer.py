"""NVIDIA's HelpSteer: answers rated by people in five attributes, and pairs with a preference (Wang et al. 2023, 2024,
2025: "HelpSteer", "HelpSteer2", "HelpSteer2-Preference", "HelpSteer3-Preference")."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lit_palm.data.readers.base import Drop, Reader, View, distinct
from lit_palm.data.readers.places import Hub
from lit_palm.data.readers.ultrafeedback import dense_ranks
from lit_palm.data.sources import Row
from lit_palm.data.templates import Message

__all__ = ["HelpSteer", "HelpSteer2", "HelpSteer2Preference", "HelpSteer3"]

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

_TURN = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")
_ROLES = {"User": "user", "Assistant": "assistant"}


def prompt_messages(text: str) -> list[Message]:
    """A prompt of one turn, or of several with "<extra_id_1>Assistant" and "<extra_id_1>User" between them."""
    first, *parts = _TURN.split(text)
    turns: list[Message] = [{"role": "user", "content": first}]
    turns += [{"role": _ROLES[r], "content": c} for r, c in zip(parts[::2], parts[1::2], strict=True)]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


class HelpSteer(Reader):
    """nvidia/HelpSteer: a `prompt` and a `response` with five attributes from 0 to 4.

    preferences: the responses to a prompt, ranked by the weighted sum of their attributes (equal sums are ties); or
    each response with that sum as its rating, for `RewardRegression`. demonstrations: the best response.
    prompts: each prompt once.

    Args:
        weights: what each of helpfulness, correctness, coherence, complexity and verbosity counts; None: helpfulness
            alone. Llama3-70B-SteerLM-RM was used with 0.65, 0.8, 0.45, 0.55 and -0.4.
        form: `ranking` or `rating`.

    Raises:
        ValueError: when an attribute is unknown or a weight not finite.
    """

    name = "nvidia/HelpSteer"

    def __init__(self, weights: dict[str, float] | None = None, form: Literal["ranking", "rating"] = "ranking") -> None:
        for attribute, weight in (weights or {}).items():
            if attribute not in ATTRIBUTES or not math.isfinite(weight):
                raise ValueError(f"data.reader.weights has {attribute}: {weight}; weigh {', '.join(ATTRIBUTES)}")
        if weights is not None and not any(weights.values()):
            raise ValueError("data.reader.weights are all 0, so no response is better than another")
        self.weights, self.form = weights or {"helpfulness": 1.0}, form

    @property
    def hub(self) -> Hub:
        return Hub(self.name)

    def preferences(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        if self.form == "rating":
            for row, prompt, response, rating in self._rated(rows):
                answer = {"prompt": prompt_messages(prompt), "completion": response, "rating": rating}
                yield Row(row.where, answer, prompt)
            return
        for prompt, answers in self._by_prompt(rows).items():
            row, scores = answers[0][0], [score for _, _, score in answers]
            if len(answers) < 2:
                drop(row, "the prompt has a single response")
            elif len(set(scores)) == 1:
                drop(row, "all responses have the same score")
            else:
                columns = {
                    "prompt": prompt_messages(prompt),
                    "completions": [response for _, response, _ in answers],
                    "ranks": dense_ranks(scores),
                }
                yield Row(row.where, columns, prompt)

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for prompt, answers in self._by_prompt(rows).items():
            row, best, _ = max(answers, key=lambda answer: answer[2])
            messages = [*prompt_messages(prompt), {"role": "assistant", "content": best}]
            yield Row(row.where, {"messages": messages}, prompt)

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        prompts = ((row, self.field(row, "prompt", str)) for row in rows)
        yield from distinct((Row(r.where, {"prompt": prompt_messages(p)}, p) for r, p in prompts), drop)

    def _by_prompt(self, rows: Iterator[Row]) -> dict[str, list[tuple[Row, str, float]]]:
        found: dict[str, list[tuple[Row, str, float]]] = {}
        for row, prompt, response, score in self._rated(rows):
            found.setdefault(prompt, []).append((Row(row.where, {}), response, score))
        return found

    def _rated(self, rows: Iterator[Row]) -> Iterator[tuple[Row, str, str, float]]:
        for row in rows:
            score = sum(weight * self.field(row, name, float) for name, weight in self.weights.items())
            # rounded, so that the order of adding makes no difference between equal ratings
            yield row, self.field(row, "prompt", str), self.field(row, "response", str), round(score, 9)


class HelpSteer2(HelpSteer):
    """nvidia/HelpSteer2: as HelpSteer, with two responses to each prompt, and prompts of several turns.

    Args:
        weights: what each of helpfulness, correctness, coherence, complexity and verbosity counts; None: helpfulness
            alone. Llama3-70B-SteerLM-RM was used with 0.65, 0.8, 0.45, 0.55 and -0.4.
        form: `ranking` or `rating`.
    """

    name = "nvidia/HelpSteer2"


class _Strengths(Reader):
    """Two responses, and from -3 to 3 how much the second is preferred to the first."""

    responses: tuple[str, str]
    strength: str

    def __init__(self, min_strength: int = 1) -> None:
        if not 1 <= min_strength <= 3:
            raise ValueError(f"data.reader.min_strength is {min_strength}; it must be 1, 2 or 3")
        self.min_strength = min_strength

    @abstractmethod
    def _prompt(self, row: Row) -> list[Message]:
        """The conversation that both responses answer."""

    def _left_out(self, row: Row) -> str | None:
        return None

    def preferences(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row, prompt, better, worse, strength in self._pairs(rows, drop):
            columns = {"prompt": prompt, "chosen": better, "rejected": worse, "margin": float(strength)}
            yield Row(row.where, columns)

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row, prompt, better, _, _ in self._pairs(rows, drop):
            yield Row(row.where, {"messages": [*prompt, *better]})

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        kept = (row for row in rows if not self._dropped(row, drop))
        yield from distinct((Row(row.where, {"prompt": self._prompt(row)}) for row in kept), drop)

    def _dropped(self, row: Row, drop: Drop) -> bool:
        reason = self._left_out(row)
        if reason is not None:
            drop(row, reason)
        return reason is not None

    def _pairs(self, rows: Iterator[Row], drop: Drop) -> Iterator[tuple[Row, list[Message], Any, Any, int]]:
        for row in rows:
            prompt, strength = self._prompt(row), self.field(row, self.strength, int)
            answers = [[{"role": "assistant", "content": self.field(row, name, str)}] for name in self.responses]
            if not -3 <= strength <= 3:
                raise self.off(row, self.strength, int, f"is {strength}, not from -3 to 3")
            if self._dropped(row, drop):
                continue
            if strength == 0:
                drop(row, "neither response is preferred")
            elif abs(strength) < self.min_strength:
                drop(row, f"the preference is weaker than {self.min_strength} (data.reader.min_strength)")
            else:
                better, worse = answers if strength < 0 else answers[::-1]
                yield row, prompt, better, worse, abs(strength)


class HelpSteer2Preference(_Strengths):
    """nvidia/HelpSteer2, folder `preference`: pairs of responses with a preference from -3 (the first) to 3.

    preferences: pairs with the strength as `margin`. demonstrations: the preferred response. prompts: each once.
    The hub serves all rows as one split; the column `split` tells training and validation.

    Args:
        min_strength: weaker preferences are left out; 1 takes all but "about the same".
    """

    responses, strength = ("response_1", "response_2"), "preference_strength"

    @property
    def hub(self) -> Hub:
        return Hub("nvidia/HelpSteer2", data_dir="preference")

    def splits(self, view: View) -> Mapping[str, str]:
        return {"train": "train", "validation": "val"}

    def open(self, source: str, split: str, limit: int | None) -> Iterator[Row]:
        taken = 0
        for row in super().open(source, "train", None):
            if self.field(row, "split", str) == split:
                taken += 1
                yield row
                if taken == limit:
                    return

    def has_splits(self, source: str) -> bool:
        return True

    def identity(self, source: str, split: str, view: View) -> str:
        return f"{split} of {super().identity(source, 'train', view)}"

    def _prompt(self, row: Row) -> list[Message]:
        return prompt_messages(self.field(row, "prompt", str))


class HelpSteer3(_Strengths):
    """nvidia/HelpSteer3, configuration `preference`: a `context` of messages, and which of two responses is better.

    The preference goes from -3 (the first) to 3 (the second). preferences: pairs with the strength as `margin`.
    demonstrations: the preferred response. prompts: each once.

    Args:
        min_strength: weaker preferences are left out; 1 takes all but "about the same".
        domains: general, stem, code, multilingual; None: all.
        languages: natural and programming languages as the column `language` names them; None: all.
    """

    responses, strength = ("response1", "response2"), "overall_preference"

    def __init__(
        self, min_strength: int = 1, domains: list[str] | None = None, languages: list[str] | None = None
    ) -> None:
        super().__init__(min_strength)
        self.domains, self.languages = domains, languages

    @property
    def hub(self) -> Hub:
        return Hub("nvidia/HelpSteer3", config="preference")

    def _prompt(self, row: Row) -> list[Message]:
        turns = range(len(self.field(row, "context", list)))
        return [{key: self.field(row, f"context[{i}].{key}", str) for key in ("role", "content")} for i in turns]

    def _left_out(self, row: Row) -> str | None:
        if self.domains is not None and self.field(row, "domain", str) not in self.domains:
            return f"the domain is not {' or '.join(self.domains)} (data.reader.domains)"
        if self.languages is not None and self.field(row, "language", str) not in self.languages:
            return f"the language is not {' or '.join(self.languages)} (data.reader.languages)"
        return None
