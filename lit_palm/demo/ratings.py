"""Real human ratings: fetch them once through pip, verify them, read them.

The source distribution of vaderSentiment 3.3.2 carries the data of Hutto & Gilbert, "VADER: A Parsimonious Rule-based
Model for Sentiment Analysis of Social Media Text", ICWSM 2014: 23,703 snippets (movie and product reviews, tweets,
newspaper editorials), each rated from -4 (extremely negative) to 4 (extremely positive) by 15 people or more. The texts
are other people's, so they are not part of this repository: they are fetched into a cache.

    archive = fetch()                    # ~/.cache/lit_palm/demo/vaderSentiment-3.3.2.tar.gz, or below $LIT_PALM_CACHE
    snippets = read_snippets(archive)    # list[Snippet], movie reviews first

The download is pip's own, so whatever index, mirror, proxy or certificate pip is configured for is used. pip gets the
expected SHA-256 with the requirement and checks it before it looks inside; we check again. Nothing is unpacked to disk.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lit_palm.demo.files import sha256_file
from lit_palm.folders import cache_folder

__all__ = ["ARCHIVE", "SHA256", "SOURCES", "Snippet", "fetch", "read_snippets"]

REQUIREMENT = "vaderSentiment==3.3.2"
ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"

# our name of a source -> how its two files begin; of two snippets with equal text the first is kept, so movies lead
SOURCES = {
    "movies": "movieReviewSnippets",
    "amazon": "amazonReviewSnippets",
    "tweets": "tweets",
    "nyt": "nytEditorialSnippets",
}


@dataclass(frozen=True)
class Snippet:
    """A text with what people said about it."""

    id: str
    """Source and number, such as "movies/17" or "nyt/3_2": stable, splits derive from it."""
    source: str
    """A key of `SOURCES`."""
    text: str
    """As it was rated, without white space at its ends."""
    rating: float
    """Mean of the raw ratings, -4 to 4."""
    num_raters: int
    """How many people rated it."""


def fetch(cache: str | os.PathLike[str] | None = None, *, sha256: str = SHA256) -> Path:
    """The path of the verified archive in the cache, downloaded when it is not there yet.

    Args:
        cache: folder to keep it in; None means `cache_folder()/demo`.
        sha256: expected SHA-256 of the archive.

    Raises:
        ValueError: when the download fails or a file is not the expected one; the message says how to go on.
    """
    folder = Path(cache) if cache is not None else cache_folder() / "demo"
    path = folder / ARCHIVE
    if path.exists():
        found = sha256_file(path)
        if found != sha256:
            raise ValueError(
                f"{path} is not the expected file: SHA-256 {found}, not {sha256}. Delete it and run again."
            )
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch.", dir=folder) as temporary:
        downloaded = _pip_download(Path(temporary), path, sha256)
        found = sha256_file(downloaded)
        if found != sha256:
            raise ValueError(_mismatch(path, found, sha256))
        os.replace(downloaded, path)  # the same file system, so nobody ever sees half a file
    return path


def _pip_download(folder: Path, destination: Path, sha256: str) -> Path:
    """Run `pip download` into `folder`; errors speak of `destination`, where the file may be put by hand."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "vaderSentiment"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    # pip insists on the metadata of what it downloads; with our own setuptools that takes a second instead of four
    attempts = [[]] if importlib.util.find_spec("setuptools") is None else [["--no-build-isolation"], []]
    for extra in attempts:
        result = subprocess.run([*command, *extra], capture_output=True, text=True, errors="replace", check=False)
        said = result.stderr + result.stdout
        if result.returncode == 0 or "metadata" not in said:  # only a failed build is worth the slower way
            break
    if "DO NOT MATCH THE HASHES" in said:
        found = [line.split()[-1] for line in said.splitlines() if line.strip().startswith("Got ")]
        raise ValueError(_mismatch(destination, found[0] if found else "unknown", sha256))
    files = list(folder.glob("*.tar.gz"))
    if result.returncode != 0 or len(files) != 1:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        reasons = [line for line in lines if line.startswith("ERROR:")] or lines or ["it said nothing"]
        raise ValueError(
            f"could not download {REQUIREMENT} (the human ratings, 2.5 MB) with pip: {reasons[-1]}\n"
            f"Are you online, and can pip reach its index? Then run the same command again. Or, on a machine that is "
            f"online, run\n  pip download --no-deps --no-binary vaderSentiment {REQUIREMENT}\n"
            f"and put the file at\n  {destination}"
        )
    return files[0]


def _mismatch(path: Path, found: str, expected: str) -> str:
    return (
        f"the download of {REQUIREMENT} is not the expected file: SHA-256 {found}, expected {expected}. A proxy or "
        f"mirror may have changed it: run again, or put the right {ARCHIVE} at\n  {path}"
    )


def read_snippets(archive: str | os.PathLike[str]) -> list[Snippet]:
    """All snippets of the archive, in the order of `SOURCES` and of the files. Reads in memory, unpacks nothing.

    Raises:
        ValueError: when a file is missing or a line is not as the data set describes; the message names file and line.
    """
    snippets = []
    with tarfile.open(archive) as outer:
        inner_bytes = _member(outer, INNER_ARCHIVE)
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        for source, prefix in SOURCES.items():
            texts_name, ratings_name = f"{prefix}_GroundTruth.txt", f"{prefix}_anonDataRatings.txt"
            texts = parse_texts(_member(inner, f"hutto_ICWSM_2014/{texts_name}"), texts_name)
            ratings = parse_ratings(_member(inner, f"hutto_ICWSM_2014/{ratings_name}"), ratings_name)
            if texts.keys() != ratings.keys():
                odd = sorted(texts.keys() ^ ratings.keys())[:3]
                raise ValueError(f"{texts_name} and {ratings_name} disagree on the snippets {odd}")
            for number, text in texts.items():
                raw = ratings[number]
                mean = math.fsum(raw) / len(raw)  # the files' own means are off for some tweets: always recompute
                snippets.append(Snippet(f"{source}/{number}", source, text, mean, len(raw)))
    return snippets


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """Content of one regular file of a tar archive."""
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise ValueError(f"the archive of the ratings has no file {name}")
    with file:
        return file.read()


def _lines(content: bytes, name: str, num_fields: int) -> list[tuple[str, list[str]]]:
    """("name:line", fields) of a TSV file that may start with a BOM and ends its lines with CRLF."""
    rows = []
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
        line = line.removesuffix("\r")
        if not line:
            continue
        fields = line.split("\t", num_fields - 1)
        if len(fields) != num_fields:
            raise ValueError(f"{name}:{number}: expected {num_fields} fields separated by tabs, found {len(fields)}")
        rows.append((f"{name}:{number}", fields))
    return rows


def parse_texts(content: bytes, name: str) -> dict[str, str]:
    """Snippet number -> text, from the content of a `*_GroundTruth.txt` file (number, mean, text)."""
    texts: dict[str, str] = {}
    for where, (number, _mean, text) in _lines(content, name, 3):
        if number in texts:
            raise ValueError(f"{where}: snippet {number} appears twice")
        texts[number] = text.strip()
    return texts


def parse_ratings(content: bytes, name: str) -> dict[str, list[int]]:
    """Snippet number -> raw ratings, from the content of a `*_anonDataRatings.txt` file (number, mean, sd, list)."""
    ratings: dict[str, list[int]] = {}
    for where, (number, _mean, _deviation, listed) in _lines(content, name, 4):
        try:
            raw = json.loads(listed)
        except json.JSONDecodeError:
            raw = None
        if not isinstance(raw, list) or not raw or not all(type(x) is int and -4 <= x <= 4 for x in raw):
            raise ValueError(f"{where}: expected a list of ratings from -4 to 4, found {listed[:40]!r}")
        if number in ratings:
            raise ValueError(f"{where}: snippet {number} appears twice")
        ratings[number] = raw
    return ratings
