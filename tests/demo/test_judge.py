"""The judge against least squares solved another way (torch.linalg.lstsq on the penalty written as extra rows)."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_palm.demo import judge as judging
from lit_palm.demo.files import write_jsonl
from lit_palm.demo.judge import Judge, fit_judge, leave_one_out, pair_accuracy, ridge, terms_of

TEXTS = [
    "a fine, fine film", "a fine plot!", "no plot and no film", "it's a bore", "what a bore, what a plot",
    "the film is fine", "the bore is a bore", "fine fine fine", "unique words only here", "it's the film",
]  # fmt: skip
RATINGS = [2.0, 2.5, -1.5, -2.0, -1.0, 1.5, -3.0, 3.0, 0.0, 0.4]
ROWS = [{"text": text, "rating": rating} for text, rating in zip(TEXTS, RATINGS, strict=True)]


def features_by_hand(texts: list[str], terms: list[str], idf: list[float]) -> Tensor:
    """[texts, terms]: (1 + log count) * idf, rows of length 1, from counting substrings of normalised text."""
    rows = []
    for text in texts:
        words = text.replace(",", "").replace("!", " !").split()
        grams = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
        row = [(1 + math.log(grams.count(t))) * w if t in grams else 0.0 for t, w in zip(terms, idf, strict=True)]
        length = sum(x * x for x in row) ** 0.5
        rows.append([x / length if length else 0.0 for x in row])
    return torch.tensor(rows, dtype=torch.float64)


def least_squares(x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Weights and intercept that minimise |y - xw - b|^2 + alpha |w|^2."""
    n, p = x.shape
    upper = torch.cat([x, torch.ones(n, 1, dtype=x.dtype)], 1)
    lower = torch.cat([alpha**0.5 * torch.eye(p, dtype=x.dtype), torch.zeros(p, 1, dtype=x.dtype)], 1)
    target = torch.cat([y, torch.zeros(p, dtype=x.dtype)])
    solution = torch.linalg.lstsq(torch.cat([upper, lower]), target[:, None]).solution[:, 0]
    return solution[:p], solution[p]


def test_terms() -> None:
    assert terms_of("It's GOOD, good!") == {
        "it's": 1, "good": 2, "!": 1, "it's good": 1, "good good": 1, "good !": 1
    }  # fmt: skip


@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_fit_is_ridge_regression(alpha: float) -> None:
    """Tolerance 1e-9: two float64 solutions of a well-conditioned system."""
    judge = Judge.fit(ROWS, alphas=[alpha])
    terms = list(judge.vocabulary)
    counted = [set(terms_of(text)) for text in TEXTS]
    assert set(terms) == {term for grams in counted for term in grams if sum(term in g for g in counted) >= 2}
    idf = [math.log(11 / (1 + sum(term in grams for grams in counted))) + 1 for term in terms]
    weight, bias = least_squares(features_by_hand(TEXTS, terms, idf), torch.tensor(RATINGS, dtype=torch.float64), alpha)
    torch.testing.assert_close(judge.weight, weight, rtol=0, atol=1e-9)
    assert judge.bias == pytest.approx(bias.item(), abs=1e-9)
    unseen = ["a fine bore", "", "nothing known", "the film! the film!"]
    expected = features_by_hand(unseen, terms, idf) @ weight + bias
    torch.testing.assert_close(torch.tensor(judge.score(unseen), dtype=torch.float64), expected, rtol=0, atol=1e-9)
    assert judge.score(["", "nothing known"]) == [judge.bias, judge.bias]


def test_leave_one_out_is_refitting_without_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 20, dtype=torch.float64, generator=generator)
    y = torch.randn(12, dtype=torch.float64, generator=generator) + 3
    centred = x - x.mean(0)
    means = {}
    for alpha in (0.3, 3.0, 30.0):
        errors = []
        for i in range(12):
            rest = [j for j in range(12) if j != i]
            weight, bias = least_squares(x[rest], y[rest], alpha)
            errors.append(y[i] - x[i] @ weight - bias)
        found, dual = leave_one_out(centred @ centred.T, y, alpha)
        torch.testing.assert_close(found, torch.stack(errors), rtol=0, atol=1e-9)
        torch.testing.assert_close(centred.T @ dual, least_squares(x, y, alpha)[0], rtol=0, atol=1e-9)
        means[alpha] = torch.stack(errors).square().mean().item()
    assert ridge(centred @ centred.T, y, list(means))[1] == min(means, key=means.__getitem__)


def test_learns_what_words_mean() -> None:
    rows = [{"text": f"the {noun} is {word}", "rating": rating} for noun in ("film", "plot", "cast")
            for word, rating in {"superb": 3, "dire": -3}.items()]  # fmt: skip
    high, low = Judge.fit(rows).score(["superb music", "dire music"])
    assert high > 0.5 > -0.5 > low


def test_needs_texts() -> None:
    with pytest.raises(ValueError, match="at least 3 rated texts, found 2"):
        Judge.fit(ROWS[:2])


def test_no_term_twice_means_the_mean() -> None:
    judge = Judge.fit([{"text": text, "rating": r} for text, r in (("one", 1.0), ("two", 2.0), ("three", 6.0))])
    assert judge.score(["one", "four"]) == pytest.approx([3.0, 3.0])


def test_save_and_load(tmp_path: Path) -> None:
    judge = Judge.fit(ROWS)
    judge.save(tmp_path / "judge.safetensors")
    again = Judge.load(tmp_path / "judge.safetensors")
    assert again.score(TEXTS) == judge.score(TEXTS)
    assert again.alpha == judge.alpha


def test_load_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    with pytest.raises(ValueError, match="no such file; make it with"):
        Judge.load(path)
    path.write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Judge.load(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, str(path))
    with pytest.raises(ValueError, match="not a judge of this version"):
        Judge.load(path)


def test_pair_accuracy_by_hand() -> None:
    assert pair_accuracy([3, 1, 2, 0], [1, 2, 2, -1]) == (1 + 0 + 0.5 + 1) / 4


def test_vader_prefers_praise() -> None:
    pytest.importorskip("vaderSentiment")
    good, bad = judging.vader_scores(["A wonderful, great film!", "A terrible, awful film."])
    assert good > 0.5 > -0.5 > bad


def test_vader_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ValueError, match=r"pip install 'lit-palm\[demo\]'"):
        judging.vader_scores(["x"])


def test_fit_judge_measures_and_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "vader_scores", lambda texts: [float(len(text)) for text in texts])
    write_jsonl(tmp_path / "ratings/judge.jsonl", ROWS)
    pairs = [{"chosen": "fine film", "rejected": "a bore"}, {"chosen": "bore", "rejected": "fine plot, fine film"}]
    write_jsonl(tmp_path / "preferences/test.jsonl", pairs)
    path = tmp_path / "out" / "judge.safetensors"
    figures, fitted = fit_judge(tmp_path, path)
    assert fitted
    assert (figures["judge"], figures["vader"], figures["chance"]) == (0.5, 0.5, 0.5)
    assert json.loads((tmp_path / "out" / "judge.json").read_text()) == figures
    assert fit_judge(tmp_path, path) == (figures, False)
    write_jsonl(tmp_path / "preferences/test.jsonl", pairs[:1])
    figures, fitted = fit_judge(tmp_path, path)
    assert fitted
    assert figures["judge"] == 1.0
    os.truncate(path, 10)
    assert fit_judge(tmp_path, path)[1]
    assert Judge.load(path).alpha == figures["alpha"]
