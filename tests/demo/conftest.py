"""Self-written ratings in the exact layout of the published ones: no real review is part of this repository."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

PREFIXES = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "nyt": "nytEditorialSnippets",
}
SETUP = b"""
import os, pathlib
from setuptools import setup
if "FIXTURE_MARK" in os.environ:
    pathlib.Path(os.environ["FIXTURE_MARK"]).touch()
setup(name="vaderSentiment", version="3.3.2")
"""
Entry = tuple[str, str, str, list[int]]  # number, the mean that the file claims, text, raw ratings


def invented_reviews() -> list[Entry]:
    """600 short reviews, good words rated high and bad ones low."""
    openings = ["Our {}", "Their {}", "Every {}", "No {}", "Half the {}", "That {}"]
    things = ["ending", "cast", "music", "plot", "camera", "script", "hero", "joke", "scene", "pace"]
    verdicts = {"shines brightly": 3, "works well": 2, "is fine": 1, "is there": 0, "drags badly": -2}
    tails = ["from start to end.", "as I remember it."]
    entries: list[Entry] = []
    for number, parts in enumerate(itertools.product(openings, things, verdicts, tails), 1):
        opening, thing, verdict, tail = parts
        text = f"{opening.format(thing)} {verdict} {tail}"
        rating = verdicts[verdict]
        raw = [rating] * 14 + [max(-4, rating - 1), rating]
        entries.append((str(number), f"{sum(raw) / 16:.9f}", text, raw))
    return entries


def small_sources() -> dict[str, list[Entry]]:
    return {
        "movies": invented_reviews(),
        "amazon": [("1_1", "1.0", "the lid  closes, and stays closed.", [1, 1, 1]), ("1_2", "0.0", " a lid. ", [0, 0])],
        "tweets": [("1", "9.9", "café tonight!", [4, -4, 3]), ("2", "-0.5", "late again", [-1, 0])],
        "nyt": [("1_1", "0.5", "The council met.", [0, 1]), ("2_1", "0.5", "the council  MET.", [0, 1])],
    }


def tsv(entries: list[Entry]) -> tuple[bytes, bytes]:
    """Content of the file of texts and of the file of ratings."""
    texts = "".join(f"{number}\t{mean}\t{text}\r\n" for number, mean, text, _ in entries)
    ratings = "".join(f"{number}\t{mean}\t0.5\t{raw}\r\n" for number, mean, _, raw in entries)
    return texts.encode(), ratings.encode()


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def make_archive(tmp_path: Path) -> Callable[..., Path]:
    """Write a source distribution like the published one; `sources` replaces the entries of `small_sources`."""

    def make(folder: Path | None = None, **sources: list[Entry]) -> Path:
        inner = {}
        for source, entries in {**small_sources(), **sources}.items():
            texts, ratings = tsv(entries)
            bom = b"\xef\xbb\xbf" if source == "amazon" else b""  # as in the published files
            inner[f"hutto_ICWSM_2014/{PREFIXES[source]}_GroundTruth.txt"] = texts
            inner[f"hutto_ICWSM_2014/{PREFIXES[source]}_anonDataRatings.txt"] = bom + ratings
        root = "vaderSentiment-3.3.2"
        outer = {
            f"{root}/PKG-INFO": b"Metadata-Version: 2.1\nName: vaderSentiment\nVersion: 3.3.2\n",
            f"{root}/setup.py": SETUP,
            f"{root}/additional_resources/hutto_ICWSM_2014.tar.gz": tar_gz(inner),
        }
        path = (folder or tmp_path / "index") / "vaderSentiment-3.3.2.tar.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar_gz(outer))
        return path

    return make
