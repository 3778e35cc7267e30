"""UltraFeedback (Cui et al. 2023): four models' answers to a prompt, each rated in several aspects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from lit_palm.data.readers.base import Drop, Reader, View, distinct, user
from lit_palm.data.readers.places import Hub
from lit_palm.data.sources import Row

__all__ = ["UltraFeedback", "UltraFeedbackBinarized", "dense_ranks"]

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def dense_ranks(scores: Sequence[float]) -> list[int]:
    """0 for the highest score, 1 for the next one; equal scores are ties."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) for score in scores]


class UltraFeedback(Reader):
    """openbmb/UltraFeedback: an instruction with `completions`, as the authors published it.

    preferences: a ranking of the answers by their score; equal scores are ties. demonstrations: the best answer.
    prompts: the instruction, with the columns `source`, `correct_answers` and `incorrect_answers`. The dataset has no
    validation split: set `data.validation_fraction`.

    Args:
        score: `aspects`, the mean of the aspects' ratings; or `overall`, the column `overall_score`, in which some low
            scores of the first release were written as 10.
        aspects: the aspects that are averaged, of instruction_following, honesty, truthfulness and helpfulness; None:
            all. Ratings that are N/A count for nothing.
        without: sources to leave out, such as [truthful_qa, false_qa] where these are evaluated on.

    Raises:
        ValueError: when an aspect is unknown.
    """

    def __init__(
        self,
        score: Literal["aspects", "overall"] = "aspects",
        aspects: list[str] | None = None,
        without: list[str] | None = None,
    ) -> None:
        unknown = [name for name in aspects or () if name not in ASPECTS]
        if unknown or aspects == []:
            raise ValueError(f"data.reader.aspects is {aspects}; name some of {', '.join(ASPECTS)}")
        self.score, self.aspects, self.without = score, aspects, without

    @property
    def hub(self) -> Hub:
        return Hub("openbmb/UltraFeedback")

    def splits(self, view: View) -> Mapping[str, str]:
        return {"train": "train"}

    def preferences(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row, texts, scores in self._scored(rows, drop):
            if len(texts) < 2:
                drop(row, "fewer than two answers have a score")
            elif len(set(scores)) == 1:
                drop(row, "all answers have the same score")
            else:
                prompt = user(self.field(row, "instruction", str))
                yield Row(row.where, {"prompt": prompt, "completions": texts, "ranks": dense_ranks(scores)})

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row, texts, scores in self._scored(rows, drop):
            if not texts:
                drop(row, "no answer has a score")
            else:
                best = texts[max(range(len(texts)), key=scores.__getitem__)]
                answer = {"role": "assistant", "content": best}
                yield Row(row.where, {"messages": [*user(self.field(row, "instruction", str)), answer]})

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        yield from distinct(self._prompts(rows, drop), drop)

    def _prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row in self._wanted(rows, drop):
            columns: dict[str, Any] = {"prompt": user(self.field(row, "instruction", str))}
            for name in ("correct_answers", "incorrect_answers"):
                columns[name] = list(self.field(row, name, list, null=True) or [])
            yield Row(row.where, {**columns, "source": self.field(row, "source", str, null=True)})

    def _wanted(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row in rows:
            source = self.field(row, "source", str, null=True)
            if self.without and source in self.without:
                drop(row, f"the source is {' or '.join(self.without)} (data.reader.without)")
            else:
                yield row

    def _scored(self, rows: Iterator[Row], drop: Drop) -> Iterator[tuple[Row, list[str], list[float]]]:
        """Rows with those of their answers that have a score."""
        for row in self._wanted(rows, drop):
            number = len(self.field(row, "completions", list))
            scores = [self._score(row, i) for i in range(number)]
            kept = [i for i, score in enumerate(scores) if score is not None]
            texts = [self.field(row, f"completions[{i}].response", str) for i in kept]
            yield row, texts, [score for score in scores if score is not None]

    def _score(self, row: Row, answer: int) -> float | None:
        at = f"completions[{answer}]"
        if self.score == "overall":
            return self.field(row, f"{at}.overall_score", float, null=True)
        ratings = [self._rating(row, f"{at}.annotations.{name}.Rating") for name in self.aspects or ASPECTS]
        known = [rating for rating in ratings if rating is not None]
        return sum(known) / len(known) if known else None

    def _rating(self, row: Row, path: str) -> float | None:
        value = self.field(row, path, (str, float), null=True)
        if value is None or value == "N/A":
            return None
        try:
            return float(value)
        except ValueError:
            raise self.off(row, path, (str, float), f"is {value!r:.40}, no number and not N/A") from None


class UltraFeedbackBinarized(Reader):
    """HuggingFaceH4/ultrafeedback_binarized: `chosen` and `rejected` as messages, with their scores.

    preferences: pairs with the difference of the scores as `margin` (splits train_prefs, test_prefs). demonstrations:
    the column `messages` (train_sft, test_sft). prompts: the prompt (train_gen, test_gen).

    Args:
        min_margin: pairs whose scores differ by less are left out; so are those of equal scores.

    Raises:
        ValueError: when `min_margin` is negative.
    """

    def __init__(self, min_margin: float = 0.0) -> None:
        if not min_margin >= 0:
            raise ValueError(f"data.reader.min_margin is {min_margin}; it must not be negative")
        self.min_margin = min_margin

    @property
    def hub(self) -> Hub:
        return Hub("HuggingFaceH4/ultrafeedback_binarized")

    def splits(self, view: View) -> Mapping[str, str]:
        kind = {"preferences": "prefs", "demonstrations": "sft", "prompts": "gen"}[view]
        return {"train": f"train_{kind}", "validation": f"test_{kind}", "test": f"test_{kind}"}

    def preferences(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row in rows:
            margin = self.field(row, "score_chosen", float) - self.field(row, "score_rejected", float)
            prompt, chosen, rejected = self.field(row, "prompt", str), *self._dialogues(row)
            if margin == 0:
                drop(row, "both answers have the same score")
            elif margin < self.min_margin:
                drop(row, f"the scores differ by less than {self.min_margin:g} (data.reader.min_margin)")
            else:
                yield Row(row.where, {"chosen": chosen, "rejected": rejected, "margin": margin}, prompt)

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row in rows:
            turns = range(len(self.field(row, "messages", list)))
            messages = [{k: self.field(row, f"messages[{i}].{k}", str) for k in ("role", "content")} for i in turns]
            if not any(message["role"] == "assistant" for message in messages):
                drop(row, "the assistant says nothing")
            else:
                yield Row(row.where, {"messages": messages}, self.field(row, "prompt", str))

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        found = (Row(row.where, {"prompt": user(self.field(row, "prompt", str))}) for row in rows)
        yield from distinct(found, drop)

    def _dialogues(self, row: Row) -> tuple[list[Any], list[Any]]:
        for name in ("chosen", "rejected"):
            turns = len(self.field(row, name, list))
            for i in range(turns):
                self.field(row, f"{name}[{i}].content", str)
            last = f"{name}[{max(turns - 1, 0)}].role"
            if self.field(row, last, str) != "assistant":
                raise self.off(row, last, str, "is not 'assistant'")
        return list(row.columns["chosen"]), list(row.columns["rejected"])
