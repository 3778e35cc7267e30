"""Every YAML file below configs/ parses and builds what it names, by the command that its own first lines show."""

from __future__ import annotations

import functools
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI

from lit_palm.cli import main

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
VERBS = ("fit", "validate", "test", "predict")
# what a machine without accelerators builds instead; the values of the file itself are read from --print_config
HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.num_nodes=1", "--trainer.strategy=auto",
        "--trainer.precision=32-true"]  # fmt: skip


def commands(file: str) -> list[list[str]]:
    """The `lit-palm` commands in the comment that a file opens with, as words."""
    found: list[str] = []
    for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ")
        if found and found[-1].endswith("\\"):
            found[-1] = found[-1][:-1] + text
        elif text.startswith("lit-palm "):
            found.append(text)
    return [shlex.split(command, comments=True)[1:] for command in found]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(docstring_parser, "parse_from_object", docstrings)
    argv = list(sys.argv)
    yield
    sys.argv[:] = argv


docstrings = functools.cache(docstring_parser.parse_from_object)


def holds(there: Any, given: Any, where: str = "") -> None:
    """Assert that a printed configuration has the values of a file: short names are spelled out, defaults added."""
    if isinstance(given, dict):
        if "class_path" in given and isinstance(there, dict):
            name = given["class_path"].rpartition(".")[2]
            assert there["class_path"].rpartition(".")[2] == name, where
            given = {k: v for k, v in given.items() if k != "class_path"}
        for key, value in given.items():
            if key.endswith("+"):  # appended to the list of the files before
                key = key[:-1]
                there = {**there, key: there[key][-len(value) :]}
            assert key in there, f"{where}.{key}"
            holds(there[key], value, f"{where}.{key}")
    elif isinstance(given, list):
        assert len(there) == len(given), where
        for one, other in zip(there, given, strict=True):
            holds(one, other, where)
    elif isinstance(there, dict) and "class_path" in there:  # a short name alone
        assert there["class_path"].rpartition(".")[2] == str(given).rpartition(".")[2], where
    else:
        assert there == given, f"{where}: {there!r} instead of {given!r}"


def test_there_are_files() -> None:
    assert len(FILES) > 10


@pytest.mark.parametrize("file", FILES)
def test_a_file_parses_and_builds_what_it_names(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    assert re.match(r"# \w.*\.", text), "it opens with what it does"
    shown = commands(file)
    assert any(file in words for words in shown), "and with the command that runs it"
    built: list[Any] = []

    def record(cli: LightningCLI, subcommand: str) -> None:
        built.append((cli.model, cli.datamodule, cli.trainer))

    monkeypatch.setattr(LightningCLI, "_run_subcommand", record)
    for words in (w for w in shown if w[0] in VERBS and file in w):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([*words, "--print_config"])
        out, err = capsys.readouterr()
        assert not exit.value.code, err
        flags = {w.partition("=")[0].removeprefix("--") for w in words if w.startswith("--") and "config" not in w}
        if not flags:  # otherwise a flag changes what the file says
            holds(yaml.safe_load(out), content)
        assert main([*words, *HERE]) == 0, capsys.readouterr().err
    assert built and all(part is not None for parts in built for part in parts)


def test_a_file_that_says_something_else_is_found() -> None:
    arguments = {"objective": {"class_path": "a.PPO"}, "lr": 1}
    there = {"model": {"class_path": "lit_palm.LitPolicy", "init_args": arguments}}
    holds(there, {"model": {"class_path": "LitPolicy", "init_args": {"objective": "PPO"}}})
    for wrong in ({"lr": 2}, {"rate": 1}, {"objective": "DPO"}):
        with pytest.raises(AssertionError):
            holds(there, {"model": {"class_path": "LitPolicy", "init_args": wrong}})
