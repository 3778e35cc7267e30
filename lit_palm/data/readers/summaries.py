"""Summaries with what people think of them (Stiennon et al. 2020, "Learning to summarize from human feedback").

Prompts are plain text that ends in "TL;DR:", as in the paper, and a summary follows with a space before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from lit_palm.data.readers.base import Drop, Reader, View, distinct
from lit_palm.data.readers.places import Hub
from lit_palm.data.sources import Row

__all__ = ["TLDR", "SummarizeFromFeedback"]


def post_prompt(subreddit: str, title: str, post: str) -> str:
    """What the paper's models summarise."""
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def _summary(text: str) -> str:
    return " " + text.strip()


class SummarizeFromFeedback(Reader):
    """openai/summarize_from_feedback: the human feedback of the paper.

    Part `comparisons`: `summaries` of a post, two of them, and the `choice` between them. preferences: pairs; all of
    one post stay on one side of `validation_fraction`. prompts: each post once.
    Part `axis`: a `summary` with its marks from 1 to 7. preferences: the summary with one mark as its rating, for
    `RewardRegression`. prompts: as above.

    The hub's own files are a script, which `datasets` no longer runs; its conversion to Parquet is read.

    Args:
        part: comparisons or axis.
        axis: the mark that is the rating: overall, accuracy, coverage, coherence or compatible.
        news: take also articles of CNN and the Daily Mail, which validation data have beside posts.
    """

    def __init__(
        self,
        part: Literal["comparisons", "axis"] = "comparisons",
        axis: Literal["overall", "accuracy", "coverage", "coherence", "compatible"] = "overall",
        news: bool = False,
    ) -> None:
        self.part, self.axis, self.news = part, axis, news

    @property
    def hub(self) -> Hub:
        return Hub("openai/summarize_from_feedback", data_dir=self.part, revision="refs/convert/parquet")

    def splits(self, view: View) -> Mapping[str, str]:
        if self.part == "axis":  # has no training split: its test split is the larger one
            return {"train": "test", "validation": "validation"}
        return {"train": "train", "validation": "validation"}

    def preferences(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row, prompt, group in self._asked(rows, drop):
            if self.part == "axis":
                rating = self.field(row, f"summary.axes.{self.axis}", float, null=True)
                text = self.field(row, "summary.text", str)
                if rating is None:
                    drop(row, f"there is no mark for {self.axis} (data.reader.axis)")
                else:
                    columns = {"prompt": prompt, "completion": _summary(text), "rating": float(rating)}
                    yield Row(row.where, columns, group)
                continue
            texts = [_summary(self.field(row, f"summaries[{i}].text", str)) for i in (0, 1)]
            choice = self.field(row, "choice", int)
            if choice not in (0, 1):
                raise self.off(row, "choice", int, f"is {choice}, neither 0 nor 1")
            yield Row(row.where, {"prompt": prompt, "chosen": texts[choice], "rejected": texts[1 - choice]}, group)

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        asked = (Row(row.where, {"prompt": prompt}, group) for row, prompt, group in self._asked(rows, drop))
        yield from distinct(asked, drop)

    def _asked(self, rows: Iterator[Row], drop: Drop) -> Iterator[tuple[Row, str, str]]:
        for row in rows:
            identity, post = self.field(row, "info.id", str), self.field(row, "info.post", str, null=True)
            if post is not None:
                subreddit, title = self.field(row, "info.subreddit", str), self.field(row, "info.title", str)
                yield row, post_prompt(subreddit, title, post), identity
            elif not self.news:
                self.field(row, "info.article", str)
                drop(row, "it is about a news article, not a post (data.reader.news)")
            else:
                title, article = self.field(row, "info.title", str), self.field(row, "info.article", str)
                yield row, f"TITLE: {title}\n\nARTICLE: {article}\n\nTL;DR:", identity


class TLDR(Reader):
    """The filtered TL;DR posts of the same paper, each with the summary that its author wrote.

    Read are the columns `subreddit`, `title`, `post` and `summary` of OpenAI's files and of
    vwxyzjn/summarize_from_feedback_tldr_3_filtered; and `prompt` with `label` (CarperAI/openai_summarize_tldr) or
    `completion` (trl-lib/tldr). demonstrations: the summary. prompts: the post, with the summary in the column
    `reference`.
    """

    @property
    def hub(self) -> Hub:
        return Hub("vwxyzjn/summarize_from_feedback_tldr_3_filtered")

    def splits(self, view: View) -> Mapping[str, str]:
        return {"train": "train", "validation": "validation", "test": "test"}

    def demonstrations(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        for row, prompt, summary in self._read(rows, drop):
            yield Row(row.where, {"prompt": prompt, "completion": _summary(summary)})

    def prompts(self, rows: Iterator[Row], drop: Drop) -> Iterator[Row]:
        read = self._read(rows, drop)
        yield from distinct((Row(row.where, {"prompt": p, "reference": s.strip()}) for row, p, s in read), drop)

    def _read(self, rows: Iterator[Row], drop: Drop) -> Iterator[tuple[Row, str, str]]:
        for row in rows:
            if "prompt" in row.columns:
                prompt: Any = self.field(row, "prompt", str)
                summary = self.field(row, "label" if "label" in row.columns else "completion", str)
            else:
                subreddit, title, post = (self.field(row, name, str) for name in ("subreddit", "title", "post"))
                prompt, summary = post_prompt(subreddit, title, post), self.field(row, "summary", str)
            if summary.strip():
                yield row, prompt, summary
            else:
                drop(row, "the summary is empty")
