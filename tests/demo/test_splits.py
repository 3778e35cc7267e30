"""Splits, pairs and prompts against definitions spelled out with other means than the code uses."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_palm.demo.files import unit_hash
from lit_palm.demo.ratings import Snippet, read_snippets
from lit_palm.demo.splits import (
    SplitArguments,
    assign,
    build,
    drop_duplicates,
    first_words,
    make_pairs,
    write_data,
)


def movie(number: int, text: str = "", rating: float = 0.0) -> Snippet:
    return Snippet(f"movies/{number}", "movies", text or f"text number {number}", rating, 15)


def test_unit_hash_is_the_head_of_sha256() -> None:
    """Pinned to a definition: the splits of a published result must come out the same for ever."""
    digest = hashlib.sha256(b"0\x1fsplit\x1fmovies/1").hexdigest()
    assert unit_hash(0, "split", "movies/1") == int(digest[:12], 16) / 16**12


def test_shares_of_the_splits() -> None:
    arguments = SplitArguments(judge=0.3, validation=0.05, test=0.1)
    counts = Counter(assign(movie(number), arguments) for number in range(20_000))
    for split, share in {"judge": 0.3, "validation": 0.05, "test": 0.1, "train": 0.55}.items():
        sigma = (20_000 * share * (1 - share)) ** 0.5
        assert abs(counts[split] - 20_000 * share) < 4 * sigma  # binomial, and the hash is fixed: no flakiness


def test_seeds_give_other_splits_and_other_sources_only_train() -> None:
    first, second = ([assign(movie(n), SplitArguments(seed=seed)) for n in range(100)] for seed in (0, 1))
    assert first != second
    assert {assign(replace(movie(n), source="nyt"), SplitArguments()) for n in range(100)} == {"train"}


@pytest.mark.parametrize("shares", [{"judge": 0.9, "test": 0.2}, {"test": 0.0}, {"train_rounds": 0}])
def test_impossible_arguments(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError):
        SplitArguments(**shares)  # type: ignore[arg-type]


def test_duplicates_go_with_their_first() -> None:
    kept = drop_duplicates(
        [movie(1, "A film."), movie(2, "a  FILM."), replace(movie(3), text=""), movie(4, "Another.")]
    )
    assert [snippet.id for snippet in kept] == ["movies/1", "movies/4"]


def test_nobody_sees_what_is_not_theirs(make_archive) -> None:
    snippets = read_snippets(make_archive())
    # repeat every movie review as a newspaper text: those must follow the movie review, not train the language model
    echoes = [replace(s, id=f"nyt/x{i}", source="nyt", text=s.text.upper()) for i, s in enumerate(snippets[:600])]
    files = build([*snippets, *echoes], SplitArguments())
    texts: dict[str, set[str]] = {}
    for name, rows in files.items():
        split = name.split("/")[1].removesuffix(".jsonl")
        for row in rows:
            for column in ("text", "completion", "chosen", "rejected"):
                if column in row:
                    texts.setdefault(split, set()).add(row[column].lower())
    assert set(texts) == {"train", "validation", "test", "judge"}
    for one in texts:
        for other in texts:
            if one != other:
                assert not texts[one] & texts[other]
    movies = {s.text.lower() for s in snippets if s.source == "movies"}
    assert set().union(*texts.values()) >= movies
    assert {row["text"] for row in files["text/train.jsonl"]} >= {"late again", "The council met."}
    assert all("movies" in row["id"] for name, rows in files.items() if name.startswith("ratings") for row in rows)
    demonstrations = [row["completion"] for row in files["demonstrations/train.jsonl"]]
    assert demonstrations == [row["text"] for row in files["ratings/train.jsonl"]]


def test_pairs_of_the_files(make_archive) -> None:
    snippets = read_snippets(make_archive())
    rating = {snippet.text: snippet.rating for snippet in snippets}
    files = build(snippets, SplitArguments(train_rounds=2))
    used: Counter[str] = Counter()
    for row in files["preferences/train.jsonl"]:
        assert row["prompt"] == ""
        assert rating[row["chosen"]] - rating[row["rejected"]] == pytest.approx(row["margin"])
        assert row["margin"] >= 1 - 1e-9
        used.update([row["chosen"], row["rejected"]])
    train = {row["text"] for row in files["ratings/train.jsonl"]}
    assert set(used) <= train
    assert max(used.values()) <= 2
    assert sum(used.values()) > 1.9 * len(train)  # nearly everybody twice


@settings(max_examples=50, deadline=None)
@given(
    ratings=st.lists(st.integers(-40, 40).map(lambda tenths: tenths / 10), max_size=30),
    rounds=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_pairs_of_any_ratings(ratings: list[float], rounds: int, seed: int) -> None:
    snippets = [movie(number, rating=rating) for number, rating in enumerate(ratings)]
    pairs = make_pairs(snippets, rounds, 1.0, seed)
    assert all(round(a.rating - b.rating, 6) >= 1 for a, b in pairs)
    assert len({frozenset((a.id, b.id)) for a, b in pairs}) == len(pairs)
    assert all(count <= rounds for count in Counter(s.id for pair in pairs for s in pair).values())
    if rounds == 1:  # greedy is maximal: whoever was left over has no partner left among the left over
        left = [s.rating for s in snippets if not any(s in pair for pair in pairs)]
        assert not left or round(max(left) - min(left), 6) < 1
    assert pairs == make_pairs(snippets, rounds, 1.0, seed)


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("It's a gem.", "It's a"),
        ("So  -- well,\nyes", "So  --"),
        ("Two words", None),
        ("One", None),
        ("", None),
    ],
)
def test_first_words(text: str, prompt: str | None) -> None:
    assert first_words(text) == prompt


def test_prompts(make_archive) -> None:
    snippets = read_snippets(make_archive())
    shared = Snippet("nyt/y", "nyt", "THAT  ending surprised nobody", 0.0, 20)
    files = build([*snippets, shared], SplitArguments(seed=3))
    by_id = {snippet.id: snippet.text for snippet in snippets}
    begun = {" ".join(row["text"].lower().split()[:2]) for row in files["text/train.jsonl"]}
    assert "that ending" in begun
    seen: set[str] = set()
    # the invented reviews share most beginnings, so add unusual ones to be sure that some survive
    unusual = [movie(10_000 + n, f"Word{n} begins here.") for n in range(300)]
    files = build([*snippets, shared, *unusual], SplitArguments(seed=3))
    by_id |= {snippet.id: snippet.text for snippet in unusual}
    for split in ("validation", "test"):
        rows = files[f"prompts/{split}.jsonl"]
        assert len(rows) > 5
        for row in rows:
            words = " ".join(row["prompt"].lower().split())
            assert len(words.split()) == 2
            assert words not in begun
            assert words not in seen
            seen.add(words)
            text = by_id[row["id"]]
            assert text.startswith(row["prompt"] + " ")  # with the exact case and spacing, so that a completion fits
            assert text in {r["text"] for r in files[f"ratings/{split}.jsonl"]}
    train = {" ".join(row["prompt"].lower().split()) for row in files["prompts/train.jsonl"]}
    assert len(train) == len(files["prompts/train.jsonl"])
    assert not train & seen


def test_written_once(make_archive, tmp_path: Path) -> None:
    unusual = [movie(10_000 + n, f"Word{n} begins here.") for n in range(300)]
    snippets = [*read_snippets(make_archive()), *unusual]
    folder = tmp_path / "data"
    manifest, written = write_data(folder, lambda: snippets, origin="abc")
    assert written
    before = {path: path.read_bytes() for path in folder.rglob("*.json*")}
    for name, file in manifest["files"].items():
        content = before[folder / name]
        assert file == {"rows": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}
        assert all(json.loads(line) for line in content.splitlines())
    assert write_data(folder, lambda: pytest.fail("read again"), origin="abc") == (manifest, False)
    # a file that was changed, a manifest that is broken, other arguments, other ratings: all written again
    (folder / "text/train.jsonl").write_text("{}\n")
    assert write_data(folder, lambda: snippets, origin="abc") == (manifest, True)
    (folder / "manifest.json").write_text("{")
    assert write_data(folder, lambda: snippets, origin="abc") == (manifest, True)
    assert {path: path.read_bytes() for path in folder.rglob("*.json*")} == before
    assert write_data(folder, lambda: snippets, SplitArguments(seed=1), origin="abc")[1]
    assert write_data(folder, lambda: snippets, SplitArguments(seed=1), origin="def")[1]


def test_too_few_ratings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no rows for .*preferences/train\.jsonl"):
        write_data(tmp_path, lambda: [movie(n) for n in range(50)])
    assert not (tmp_path / "manifest.json").exists()
