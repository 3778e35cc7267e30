"""An independent judge of reviews: ridge regression of people's ratings on the words of a text.

The judge learns from ratings that neither the language model nor the reward model has seen, and it is a different kind
of model, so a policy that only exploits its reward model's mistakes does not impress it.

    judge = Judge.fit(rows)                 # rows with "text" and "rating"
    judge.score(["A gem of a film."])       # on the scale of the ratings, -4 to 4
    judge.save("judge.safetensors"); judge = Judge.load("judge.safetensors")

Features are words and pairs of neighbouring words, `(1 + log count) * idf`, each text scaled to length 1. With centred
features X and ratings y, the weights are `X^T a` with `(X X^T + alpha I) a = y - mean(y)`: the dual form, since there
are more features than texts. `alpha` minimises the leave-one-out error on the judge's own ratings, which a linear fit
gives exactly without fitting again (Hastie et al., "The Elements of Statistical Learning", equation 7.64).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_palm.demo.files import read_jsonl, replacing, sha256_file, write_json

__all__ = ["ALPHAS", "Judge", "fit_judge", "leave_one_out", "pair_accuracy", "terms_of", "vader_scores"]

ALPHAS = (0.25, 0.5, 1.0, 2.0)
"""Candidates for the regularisation."""
FORMAT = "1"
MIN_COUNT = 2  # a term of a single text says nothing about another text


def terms_of(text: str) -> Counter[str]:
    """The words of a text and its pairs of neighbouring words, lower case, with how often each occurs."""
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*|[!?]", text.casefold())
    return Counter(words) + Counter(f"{a} {b}" for a, b in pairwise(words))


@dataclass
class Judge:
    """A fitted judge."""

    vocabulary: dict[str, int]
    """Term -> its place in `idf` and `weight`."""
    idf: Tensor
    """[number of terms] float64, log((1 + texts) / (1 + texts with the term)) + 1."""
    weight: Tensor
    """[number of terms] float64."""
    bias: float
    """Score of a text without known terms."""
    alpha: float
    """The regularisation that was chosen."""

    @classmethod
    def fit(cls, rows: Sequence[Mapping[str, Any]], alphas: Sequence[float] = ALPHAS) -> Judge:
        """Fit on rows with "text" and "rating", alpha chosen by the leave-one-out error on these rows.

        Raises:
            ValueError: when there are fewer than three rows.
        """
        if len(rows) < 3:
            raise ValueError(f"a judge needs at least 3 rated texts, found {len(rows)}")
        counts = [terms_of(row["text"]) for row in rows]
        num_texts = Counter(term for count in counts for term in count)
        kept = sorted(term for term, number in num_texts.items() if number >= MIN_COUNT)
        vocabulary = {term: index for index, term in enumerate(kept)}
        document_counts = torch.tensor([num_texts[term] for term in kept], dtype=torch.float64)
        idf = ((1 + len(rows)) / (1 + document_counts)).log() + 1
        ratings = torch.tensor([row["rating"] for row in rows], dtype=torch.float64)
        features = _features(counts, vocabulary, idf)
        gram = features @ features.transposed()
        gram += gram.mean() - gram.mean(0) - gram.mean(1, keepdim=True)  # as if the features were centred
        dual, alpha = ridge(gram, ratings, alphas)
        weight = features.transposed_times(dual)  # centring changes nothing here: the dual weights sum to 0
        bias = ratings.mean() - (features @ weight[:, None]).mean()
        return cls(vocabulary, idf, weight, bias.item(), alpha)

    def score(self, texts: Sequence[str]) -> list[float]:
        """The expected rating of each text."""
        features = _features([terms_of(text) for text in texts], self.vocabulary, self.idf)
        return ((features @ self.weight[:, None])[:, 0] + self.bias).tolist()

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write one safetensors file: tensors `idf`, `weight`, `bias`, `alpha`; the terms are in its metadata."""
        tensors = {
            "idf": self.idf,
            "weight": self.weight,
            "bias": torch.tensor([self.bias], dtype=torch.float64),
            "alpha": torch.tensor([self.alpha], dtype=torch.float64),
        }
        header = {**(metadata or {}), "judge_format": FORMAT, "terms": json.dumps(list(self.vocabulary))}
        with replacing(path) as temporary:
            save_file(tensors, str(temporary), metadata=header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Judge:
        """Read what `save` wrote.

        Raises:
            ValueError: when the file is missing or is not a judge.
        """
        if not Path(path).exists():
            raise ValueError(f"{path}: no such file; make it with `python -m lit_palm.demo judge`")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from None
        if header.get("judge_format") != FORMAT:
            raise ValueError(f"{path}: not a judge of this version; make it with `python -m lit_palm.demo judge`")
        vocabulary = {term: index for index, term in enumerate(json.loads(header["terms"]))}
        return cls(vocabulary, tensors["idf"], tensors["weight"], tensors["bias"].item(), tensors["alpha"].item())


@dataclass
class _Features:
    """A sparse matrix [texts, terms] whose rows have length 1 (0 when no term of the text is known)."""

    rows: Tensor
    """[entries] text, ascending."""
    columns: Tensor
    """[entries] term."""
    values: Tensor
    """[entries] float64."""
    shape: tuple[int, int]

    def __matmul__(self, dense: Tensor) -> Tensor:
        """[texts, terms] @ [terms, k]."""
        starts = torch.searchsorted(self.rows, torch.arange(self.shape[0]))
        return F.embedding_bag(self.columns, dense, starts, mode="sum", per_sample_weights=self.values)

    def transposed(self) -> Tensor:
        """[terms, texts], dense (3,000 texts and 10,000 terms take 240 MB)."""
        dense = torch.zeros(self.shape[::-1], dtype=torch.float64)
        return dense.index_put_((self.columns, self.rows), self.values)

    def transposed_times(self, vector: Tensor) -> Tensor:
        """[terms, texts] @ [texts]."""
        result = torch.zeros(self.shape[1], dtype=torch.float64)
        return result.index_add_(0, self.columns, self.values * vector[self.rows])


def _features(counts: Sequence[Mapping[str, int]], vocabulary: Mapping[str, int], idf: Tensor) -> _Features:
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    weights = idf.tolist()
    for row, count in enumerate(counts):
        known = [(vocabulary[term], number) for term, number in count.items() if term in vocabulary]
        entries = [(1 + math.log(number)) * weights[column] for column, number in known]
        length = math.hypot(*entries)
        rows.extend([row] * len(known))
        columns.extend(column for column, _ in known)
        values.extend(value / length for value in entries)
    return _Features(
        torch.tensor(rows, dtype=torch.long),
        torch.tensor(columns, dtype=torch.long),
        torch.tensor(values, dtype=torch.float64),
        (len(counts), len(vocabulary)),
    )


def ridge(gram: Tensor, ratings: Tensor, alphas: Sequence[float]) -> tuple[Tensor, float]:
    """Ridge regression with an intercept that is not penalised, in its dual form.

    Args:
        gram: [n, n] float64, `X X^T` of the centred features.
        ratings: [n] float64.
        alphas: candidates, positive; the one with the least leave-one-out error is taken.

    Returns:
        Dual weights a [n], which sum to 0, and alpha.
    """
    fits = [(*leave_one_out(gram, ratings, alpha), alpha) for alpha in alphas]
    _, dual, alpha = min(fits, key=lambda fit: fit[0].square().mean().item())
    return dual, alpha


def leave_one_out(gram: Tensor, ratings: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """[n] error at each text of the ridge that was fitted without it, and [n] dual weights of the ridge fitted on all.

    The fit is linear in the ratings, `fit = H y` with `H = 1/n + K (K + alpha I)^-1`, so the error without text i is
    exactly `(y_i - fit_i) / (1 - H_ii)`; here `y - fit = alpha a` and `1 - H_ii = alpha (K + alpha I)^-1_ii - 1/n`.
    """
    regularised = gram + alpha * torch.eye(len(gram), dtype=gram.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(regularised))
    dual = inverse @ (ratings - ratings.mean())
    return alpha * dual / (alpha * inverse.diagonal() - 1 / len(ratings)), dual


def vader_scores(texts: Sequence[str]) -> list[float]:
    """VADER's compound score of each text, -1 to 1: a baseline of words and rules made by the same authors.

    Raises:
        ValueError: when the package vaderSentiment is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ValueError("the baseline needs the package vaderSentiment: pip install 'lit-palm[demo]'") from None
    analyzer = SentimentIntensityAnalyzer()
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Share of pairs whose chosen text scores higher; a tie counts half, so chance is .5."""
    assert len(chosen) == len(rejected) > 0
    return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(chosen, rejected, strict=True)) / len(chosen)


def fit_judge(data: str | os.PathLike[str], path: str | os.PathLike[str]) -> tuple[dict[str, Any], bool]:
    """Fit on ratings/judge.jsonl of the data folder, measure on preferences/test.jsonl, write `path` and its .json.

    Nothing is done when `path` was made from the same two files.

    Returns:
        The figures: alpha, num_terms, num_snippets, num_pairs, and pair accuracies `judge`, `vader`, `chance`; and
        whether the judge was fitted.
    """
    rated, pairs = Path(data) / "ratings" / "judge.jsonl", Path(data) / "preferences" / "test.jsonl"
    rows = read_jsonl(rated, {"text": str, "rating": (int, float)})
    tests = read_jsonl(pairs, {"chosen": str, "rejected": str})
    made_from = f"{FORMAT} {sha256_file(rated)} {sha256_file(pairs)}"
    figures_path = Path(path).with_suffix(".json")
    if Path(path).exists() and figures_path.exists():
        figures = json.loads(figures_path.read_text(encoding="utf-8"))
        if figures.get("made_from") == made_from and figures.get("judge_sha256") == sha256_file(path):
            return figures, False
    chosen, rejected = [row["chosen"] for row in tests], [row["rejected"] for row in tests]
    vader = pair_accuracy(vader_scores(chosen), vader_scores(rejected))
    judge = Judge.fit(rows)
    judge.save(path)
    figures = {
        "made_from": made_from,
        "judge_sha256": sha256_file(path),
        "alpha": judge.alpha,
        "num_terms": len(judge.vocabulary),
        "num_snippets": len(rows),
        "num_pairs": len(tests),
        "judge": pair_accuracy(judge.score(chosen), judge.score(rejected)),
        "vader": vader,
        "chance": 0.5,
    }
    write_json(figures_path, figures)
    return figures, True
