"""`data` and `judge` from the command line, on invented ratings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lit_palm.demo import judge, ratings
from lit_palm.demo.__main__ import main


def test_data_then_judge(
    make_archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"shines": 3, "works": 1, "drags": -2}
    reviews = [
        (str(n), "0", f"Scene{n % 700} {word} brightly here", [words[word], words[word], words[word] - 1])
        for n, word in ((n, list(words)[n % 3]) for n in range(1, 900))
    ]
    archive = make_archive(movies=reviews)
    monkeypatch.setattr(ratings, "fetch", lambda cache: archive)
    # a baseline of its own, so that the test does not need the package
    monkeypatch.setattr(judge, "vader_scores", lambda texts: [float("shines" in text) for text in texts])
    data, path = str(tmp_path / "data"), str(tmp_path / "judge.safetensors")
    assert main(["data", "--output", data]) == 0
    assert "data: written" in capsys.readouterr().out
    assert main(["data", "--output", data]) == 0
    assert "already there, unchanged" in capsys.readouterr().out
    assert main(["judge", "--data", data, "--output", path]) == 0
    out = capsys.readouterr().out
    assert "judge 1.000" in out  # the words say it all
    assert main(["judge", "--data", str(tmp_path / "nowhere"), "--output", path]) == 1
    assert "judge.jsonl: no such file" in capsys.readouterr().err


def test_help_says_every_verb() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "lit_palm.demo", "--help"], capture_output=True, text=True, check=True
    )
    for verb in ("data", "judge", "control", "report", "addition"):
        assert f"    {verb} " in result.stdout
