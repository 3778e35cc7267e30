"""The README keeps its word to those who come from other projects.

Every key of its tables parses with the values that stand there, every command has its verb and flags, and what it says
is not here is said so.
"""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from argparse import ArgumentError
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_palm.cli import EXTRA_VERBS, build_cli, main

ROOT = Path(__file__).parents[1]
_, _, _FROM = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Coming from ")
PAGE = _FROM.partition("\n## ")[0]
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| trlX |")
]
SNIPPETS = [snippet for row in ROWS for snippet in re.findall(r"`([^`]+)`", row[2])]
COMMANDS = sorted({s for s in SNIPPETS if s.startswith("lit-palm ")})
KEYS = sorted({s for s in SNIPPETS if not s.startswith("lit-palm ") and ": " in s})
PLUGINS = {
    "lit_palm_dpo": ("DPO",), "lit_palm_grpo": ("GRPO", "TPO", "FlowRL"), "lit_palm_ilql": ("ILQL", "decode_beta"),
    "lit_palm_rejection_sampling": ("RejectionSampling",), "lit_palm_implicit_reward": ("Implicit",),
    "adam_atan2_pytorch": ("adam_atan2",),
}  # fmt: skip
NETWORK = {"class_path": "PaLMConfig", "init_args": {"d_model": 16}}
BASES: list[dict[str, Any]] = [
    {"model": {"class_path": model, "init_args": {"network": NETWORK}}, "data": {"class_path": data}}
    for model, data in (
        ("LitPolicy", "PromptData"), ("LitPolicy", "PreferenceData"), ("LitLanguageModel", "DemonstrationData"),
        ("LitRewardModel", "PreferenceData"),
    )
]  # fmt: skip


def over(base: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The configuration with one key set, where the page leaves `init_args` out."""
    made: dict[str, Any] = {name: dict(part) for name, part in base.items()}
    section, _, rest = key.partition(".")
    if not rest:
        made[section] = value if "class_path" in value else {**made[section], **value}
        if section == "model" and "network" not in value.get("init_args", {}):
            made[section]["init_args"] = {**value["init_args"], "network": NETWORK}
    elif section == "trainer":
        made[section] = {rest: value}
    else:
        made[section] = {**made[section], "init_args": {**made[section].get("init_args", {}), rest: value}}
    return made


@pytest.fixture(scope="module")
def parser() -> Any:
    """That of `lit-palm fit`, with every package of plugins/ that is installed."""
    for package in PLUGINS:
        if find_spec(package):
            importlib.import_module(package)
    found: list[Any] = []

    class Reader(build_cli()):  # type: ignore[misc]
        def instantiate_classes(self) -> None:
            found.append(self._parser("fit"))

        def _run_subcommand(self, subcommand: str) -> None:
            """Nothing is run."""

        def _set_seed(self) -> None:
            """Nothing is drawn."""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sys, "argv", ["lit-palm", "fit", "--model=LitPolicy", "--model.network=x.ckpt", "--data=PromptData"]
        )
        Reader()
    return found[0]


def test_there_are_tables_and_each_row_says_something() -> None:
    assert len(ROWS) > 60 and len(KEYS) > 45 and len(COMMANDS) >= 10
    for row in ROWS:
        assert len(row) == 3, row
        assert row[2] or "**not here**" in row[1] or len(row[1]) > 10, row


@pytest.mark.parametrize("snippet", KEYS)
def test_a_key_parses_with_the_value_that_stands_there(
    snippet: str, parser: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, names in PLUGINS.items():
        if any(name in snippet for name in names) and find_spec(package) is None:
            pytest.skip(f"{package} is not installed (make install-plugins)")
    ((key, value),) = yaml.safe_load(snippet).items()
    monkeypatch.chdir(tmp_path)
    if "start: runs/finetune/last.ckpt" in snippet:  # a network around a checkpoint reads what it goes around
        value["init_args"] = {**value["init_args"], "start": None, "base": NETWORK}
    said = []
    for base in BASES:
        if key == "model.overrides":
            base = over(base, "model.network", "runs/last.ckpt")
        try:
            config = parser.parse_object(over(base, key, value))
        except (SystemExit, ValueError, ArgumentError) as error:
            said.append(f"{error} {capsys.readouterr().err}"[-600:])
            continue
        found = config
        for name in key.split("."):
            found = found.get("init_args", found) if name not in found else found
            found = found[name]
        assert found is not None
        return
    raise AssertionError("\n".join(said))


@pytest.mark.parametrize("verb", sorted({shlex.split(command)[1] for command in COMMANDS}))
def test_commands_have_their_verb_and_flags(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [words[2:] for command in COMMANDS if (words := shlex.split(command))[1] == verb]
    flags = {word.partition("=")[0] for words in commands for word in words if word.startswith("--")}
    for named in (word for words in commands for word in words if word.startswith("configs/")):
        assert (ROOT / named).exists(), named
    if verb in ("fit", "validate"):  # Lightning's
        assert flags <= {"--config", "--ckpt_path", "--model.network"}
        return
    assert verb in EXTRA_VERBS
    with pytest.MonkeyPatch.context() as patch, suppress(SystemExit):
        patch.setenv("COLUMNS", "200")
        main([verb, *(["inspect"] if verb == "data" else []), "--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in flags), flags


def test_what_it_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / target).exists(), target
    for named in re.findall(r"`(configs/[\w/.-]*)`", PAGE):
        assert (ROOT / named).exists(), named
