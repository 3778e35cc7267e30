"""Who sees which snippet, and the jsonl files of every stage.

A movie review goes to one of four splits by a hash of its number: 30% to the judge and to nothing else, 4% to
validation, 10% to the test, the rest to training. All other sources are training text. A text that occurs again later
is dropped, so nothing held out is ever trained on. Below the output folder this writes

    text/{train,validation,test}.jsonl            {"text"}                                   pre-training
    demonstrations/{train,validation,test}.jsonl  {"prompt": "", "completion"}               fine-tuning: whole reviews
    preferences/{train,validation,test}.jsonl     {"prompt": "", "chosen", "rejected", "margin"}   reward model
    prompts/{train,validation,test}.jsonl         {"prompt", "id"}                           first two words of a review
    ratings/{train,validation,test,judge}.jsonl   {"id", "text", "rating", "num_raters"}
    manifest.json                                 arguments, rows and SHA-256 of each file

Only text/train.jsonl has other sources than movie reviews: bits per byte before and after fine-tuning speak of the same
held-out reviews. Prompts are distinct. Validation and test prompts never begin a training snippet of any source (letter
case and spacing aside), and no prompt is in both. A completion continues its prompt directly, beginning with the space.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_palm.demo.files import read_json, sha256_file, unit_hash, write_json, write_jsonl
from lit_palm.demo.ratings import Snippet

__all__ = ["SplitArguments", "assign", "build", "drop_duplicates", "first_words", "make_pairs", "write_data"]

FORMAT = 1
"""Raised whenever the files of equal arguments change."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class SplitArguments:
    """What the files depend on, besides the ratings."""

    seed: int = 0
    """Seed of the split and the pairs; another seed gives other held-out snippets."""
    judge: float = 0.30
    """Share of the movie reviews that only the judge sees."""
    validation: float = 0.04
    """Share of the movie reviews watched during training."""
    test: float = 0.10
    """Share of the movie reviews that the report speaks of."""
    min_gap: float = 1.0
    """Least difference of the mean ratings of a pair."""
    train_rounds: int = 4
    """How many training pairs a snippet is part of."""
    held_out_rounds: int = 4
    """How many validation or test pairs a snippet is part of."""

    def __post_init__(self) -> None:
        shares = (self.judge, self.validation, self.test)
        if min(shares) <= 0 or sum(shares) >= 1:
            raise ValueError(f"judge, validation and test are shares that leave some for training; got {shares}")
        if min(self.train_rounds, self.held_out_rounds) < 1:
            raise ValueError("train_rounds and held_out_rounds must be at least 1")


def normalised(text: str) -> str:
    """Text without letter case and spacing, to compare by."""
    return " ".join(text.casefold().split())


def drop_duplicates(snippets: Iterable[Snippet]) -> list[Snippet]:
    """Keep the first of all snippets with the same text, letter case and spacing aside; drop empty ones."""
    first: dict[str, Snippet] = {}
    for snippet in snippets:
        first.setdefault(normalised(snippet.text), snippet)
    first.pop("", None)
    return list(first.values())


def assign(snippet: Snippet, arguments: SplitArguments) -> str:
    """The split of one snippet: "judge", "validation", "test" or "train"."""
    if snippet.source != "movies":
        return "train"
    u = unit_hash(arguments.seed, "split", snippet.id)
    for name in ("judge", "validation", "test"):
        u -= getattr(arguments, name)
        if u < 0:
            return name
    return "train"


def make_pairs(snippets: Sequence[Snippet], rounds: int, min_gap: float, seed: int) -> list[tuple[Snippet, Snippet]]:
    """(better, worse) pairs whose ratings differ by `min_gap` or more; a snippet is in at most one pair a round.

    Each round puts the snippets in a fresh order and gives each the next free partner that is far enough away, so
    nearly every snippet is used in every round. No pair comes twice.
    """
    pairs: list[tuple[Snippet, Snippet]] = []
    seen: set[frozenset[str]] = set()
    for number in range(rounds):
        shuffled = sorted((unit_hash(seed, "pairs", number, snippet.id), i) for i, snippet in enumerate(snippets))
        waiting = [snippets[i] for _, i in shuffled]
        while waiting:
            one = waiting.pop()
            for index in range(len(waiting) - 1, -1, -1):
                other = waiting[index]
                gap = one.rating - other.rating
                if abs(gap) >= min_gap - 1e-9 and frozenset((one.id, other.id)) not in seen:  # means are rounded
                    del waiting[index]
                    seen.add(frozenset((one.id, other.id)))
                    pairs.append((one, other) if gap > 0 else (other, one))
                    break
    return pairs


def first_words(text: str, count: int = 2) -> str | None:
    """The first `count` words exactly as they stand in the text, or None when nothing follows them."""
    match = re.match(rf"\S+(?:\s+\S+){{{count - 1}}}(?=\s)", text)
    return match.group() if match else None


def make_prompts(snippets: Iterable[Snippet], excluded: set[str]) -> Rows:
    """Distinct prompts of the snippets, in their order, without those whose normalised text is `excluded`.

    The prompts that were made are added to `excluded`.
    """
    rows: Rows = []
    for snippet in snippets:
        prompt = first_words(snippet.text)
        if prompt is not None and normalised(prompt) not in excluded:
            excluded.add(normalised(prompt))
            rows.append({"prompt": prompt, "id": snippet.id})
    return rows


def beginnings(snippets: Iterable[Snippet]) -> set[str]:
    """The first two words of every snippet, normalised, also where nothing follows."""
    return {" ".join(normalised(snippet.text).split()[:2]) for snippet in snippets}


def build(snippets: Iterable[Snippet], arguments: SplitArguments) -> dict[str, Rows]:
    """File name (such as "text/train.jsonl") -> rows; see the top of this file."""
    by_split: dict[str, list[Snippet]] = {"train": [], "validation": [], "test": [], "judge": []}
    for snippet in drop_duplicates(snippets):
        by_split[assign(snippet, arguments)].append(snippet)
    files: dict[str, Rows] = {}
    taken = beginnings(by_split["train"])
    for split, members in by_split.items():
        movies = [snippet for snippet in members if snippet.source == "movies"]
        files[f"ratings/{split}.jsonl"] = [
            {"id": s.id, "text": s.text, "rating": s.rating, "num_raters": s.num_raters} for s in movies
        ]
        if split == "judge":
            continue
        rounds = arguments.train_rounds if split == "train" else arguments.held_out_rounds
        files[f"text/{split}.jsonl"] = [{"text": s.text} for s in members]
        files[f"demonstrations/{split}.jsonl"] = [{"prompt": "", "completion": s.text} for s in movies]
        files[f"preferences/{split}.jsonl"] = [
            {"prompt": "", "chosen": a.text, "rejected": b.text, "margin": a.rating - b.rating}
            for a, b in make_pairs(movies, rounds, arguments.min_gap, arguments.seed)
        ]
        files[f"prompts/{split}.jsonl"] = make_prompts(movies, set() if split == "train" else taken)
    return files


def write_data(
    folder: str | os.PathLike[str],
    read: Callable[[], Iterable[Snippet]],
    arguments: SplitArguments | None = None,
    origin: str = "",
) -> tuple[dict[str, Any], bool]:
    """Write all files and manifest.json; nothing is read or written when the manifest says they are there, unchanged.

    Args:
        folder: where to write.
        read: gives the snippets; called only when there is work to do.
        arguments: None means the defaults.
        origin: what identifies the ratings (their archive's SHA-256).

    Returns:
        The manifest, and whether files were written.
    """
    folder = Path(folder)
    arguments = arguments or SplitArguments()
    wanted = {"format": FORMAT, "ratings_sha256": origin, "arguments": asdict(arguments)}
    manifest = _intact_manifest(folder, wanted)
    if manifest is not None:
        return manifest, False
    files = build(read(), arguments)
    empty = [name for name, rows in files.items() if not rows]
    if empty:
        raise ValueError(f"no rows for {empty}: the ratings are too few for these shares and this min_gap")
    listed = {}
    for name, rows in sorted(files.items()):
        write_jsonl(folder / name, rows)
        listed[name] = {"rows": len(rows), "sha256": sha256_file(folder / name)}
    manifest = {**wanted, "files": listed}
    write_json(folder / "manifest.json", manifest)
    return manifest, True


def _intact_manifest(folder: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest in the folder if it was made for `wanted` and every file is as it says, else None."""
    try:
        manifest = read_json(folder / "manifest.json")
    except ValueError:  # none yet, or broken: write everything again
        return None
    if not isinstance(manifest, dict) or {key: manifest.get(key) for key in wanted} != wanted:
        return None
    for name, file in manifest["files"].items():
        if not (folder / name).exists() or sha256_file(folder / name) != file["sha256"]:
            return None
    return manifest
