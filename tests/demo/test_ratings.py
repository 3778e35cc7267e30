"""Fetching through pip (from a local folder, never the network) and reading the published layout."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lit_palm.demo import ratings
from lit_palm.demo.__main__ import main
from lit_palm.folders import cache_folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let pip see nothing but a local folder."""

    def only(folder: str = "") -> None:
        for name in list(os.environ):
            if name.startswith("PIP_"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        if folder:
            monkeypatch.setenv("PIP_FIND_LINKS", folder)

    return only


def test_reads_every_source_and_recomputes_means(make_archive) -> None:
    snippets = {snippet.id: snippet for snippet in ratings.read_snippets(make_archive())}
    assert len(snippets) == 606
    assert next(iter(snippets)).startswith("movies/")
    # the file claims 9.9; the mean of 4, -4 and 3 is 1
    assert snippets["tweets/1"] == ratings.Snippet("tweets/1", "tweets", "café tonight!", 1.0, 3)
    # this ratings file begins with a byte order mark, and the text has white space around it
    assert snippets["amazon/1_1"].text == "the lid  closes, and stays closed."
    assert snippets["amazon/1_2"] == ratings.Snippet("amazon/1_2", "amazon", "a lid.", 0.0, 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7\t0.5\t0.1", r"f\.txt:2: expected 4 fields"),
        ("7\t0.5\t0.1\t[1, 5]", r"f\.txt:2: expected a list of ratings"),
        ("7\t0.5\t0.1\t[]", r"f\.txt:2: expected a list of ratings"),
        ("7\t0.5\t0.1\t[1, true]", r"f\.txt:2: expected a list of ratings"),
        ("7\t0.5\t0.1\t__import__('os')", r"f\.txt:2: expected a list of ratings"),
        ("6\t0.5\t0.1\t[1]", r"f\.txt:2: snippet 6 appears twice"),
    ],
)
def test_bad_rating_lines_are_named(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratings.parse_ratings(f"6\t0\t0\t[0]\r\n{line}\r\n".encode(), "f.txt")


def test_bad_text_lines_are_named() -> None:
    with pytest.raises(ValueError, match=r"f\.txt:3: expected 3 fields"):
        ratings.parse_texts(b"1\t0\tfine\r\n2\t0\talso\tfine\r\n3\t0\r\n", "f.txt")


def test_files_must_speak_of_the_same_snippets(make_archive, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratings, "parse_ratings", lambda content, name: {"1": [0]})
    with pytest.raises(ValueError, match=r"movieReviewSnippets_GroundTruth\.txt and .* disagree on the snippets"):
        ratings.read_snippets(make_archive())


def test_offline_with_an_empty_cache_is_one_clear_error(
    tmp_path: Path, offline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    offline()
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    assert main(["data", "--output", str(tmp_path / "data")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: could not download vaderSentiment==3.3.2")
    assert "No matching distribution" in error  # pip's own reason
    assert "run the same command again" in error
    assert str(tmp_path / "cache" / "demo" / "vaderSentiment-3.3.2.tar.gz") in error  # where to put it by hand
    assert "Traceback" not in error
    assert list((tmp_path / "cache" / "demo").iterdir()) == []
    assert not (tmp_path / "data").exists()


def test_downloads_through_pip_once(make_archive, tmp_path: Path, offline, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = make_archive()
    offline(str(archive.parent))
    monkeypatch.setenv("FIXTURE_MARK", str(tmp_path / "mark"))
    expected = hashlib.sha256(archive.read_bytes()).hexdigest()
    path = ratings.fetch(tmp_path / "cache", sha256=expected)
    assert path.read_bytes() == archive.read_bytes()
    assert list(path.parent.iterdir()) == [path]  # nothing temporary is left
    assert (tmp_path / "mark").exists()  # pip does run setup.py, so the next test means something
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip ran again"))
    assert ratings.fetch(tmp_path / "cache", sha256=expected) == path


def test_a_changed_download_is_refused_before_its_code_runs(
    make_archive, tmp_path: Path, offline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip runs setup.py for the metadata; with the wrong checksum it must not get that far."""
    archive = make_archive()
    offline(str(archive.parent))
    monkeypatch.setenv("FIXTURE_MARK", str(tmp_path / "mark"))
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="not the expected file") as error:
        ratings.fetch(tmp_path / "cache")
    assert found in str(error.value)
    assert ratings.SHA256 in str(error.value)
    assert "run again" in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "mark").exists()


def test_a_changed_download_is_refused_even_when_pip_accepts_it(
    make_archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ratings, "_pip_download", lambda folder, *rest: make_archive(folder))
    with pytest.raises(ValueError, match="not the expected file"):
        ratings.fetch(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wrong_file_in_the_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / ratings.ARCHIVE).write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"3\.3\.2\.tar\.gz is not the expected file.*Delete it and run again"):
        ratings.fetch(tmp_path)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("LIT_PALM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "lit_palm"


@pytest.mark.skipif(not (cache_folder() / "demo" / ratings.ARCHIVE).exists(), reason="ratings not fetched yet")
def test_the_published_ratings() -> None:
    """The figures that the data set's description gives."""
    snippets = ratings.read_snippets(ratings.fetch())
    counts = {source: sum(snippet.source == source for snippet in snippets) for source in ratings.SOURCES}
    assert counts == {"movies": 10_605, "amazon": 3_708, "tweets": 4_200, "nyt": 5_190}
    assert min(snippet.num_raters for snippet in snippets) == 15
