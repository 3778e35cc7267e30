"""The YAML files and the README's YAML parse and build what they name, by the command that they show."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import lit_palm_grpo
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lit_palm_grpo import DAPO, GRPO

from lit_palm.cli import main

HERE = Path(__file__).parents[1]
FILES = sorted((HERE / "configs").glob("*.yaml"))
README = (HERE / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[LightningCLI]:
    """Command lines that were parsed and built, instead of run."""
    found: list[LightningCLI] = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: found.append(cli))
    return found


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as exit:
        main([*words, "--print_config"])
    out, err = capsys.readouterr()
    assert not exit.value.code, err
    return yaml.safe_load(out)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_builds_by_its_own_command(
    path: Path, built: list[LightningCLI], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE.parents[1])
    text = path.read_text(encoding="utf-8")
    shown = re.search(r"^#   lit-palm (fit .*)$", text, re.M)
    assert shown and f"plugins/lit-palm-grpo/configs/{path.name}" in shown.group(1)
    words = shlex.split(shown.group(1))
    objective = yaml.safe_load(text)["model"]["init_args"]["objective"]
    there = printed(words, capsys)["model"]["init_args"]["objective"]
    assert there["class_path"].endswith(objective["class_path"])
    assert there["init_args"].items() >= objective["init_args"].items()
    assert main([*words, "--trainer.accelerator=cpu", "--trainer.logger=false"]) == 0, capsys.readouterr().err
    assert type(built[0].model.objective) is {"grpo": GRPO, "dapo": DAPO}[path.stem]


def test_the_first_file_shows_every_argument_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    shown = yaml.safe_load((HERE / "configs/grpo.yaml").read_text(encoding="utf-8"))["model"]["init_args"]["objective"]
    assert GRPO(**shown["init_args"]).__dict__ == GRPO().__dict__
    printed_all = printed(["fit", "--config", str(HERE / "configs/grpo.yaml")], capsys)
    assert printed_all["model"]["init_args"]["objective"]["init_args"].keys() == shown["init_args"].keys()


def test_the_readmes_run_builds(
    tmp_path: Path, built: list[LightningCLI], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    (tmp_path / "run.yaml").write_text(block, encoding="utf-8")
    assert main(["fit", "--config", "run.yaml", "--trainer.logger=false"]) == 0, capsys.readouterr().err
    assert isinstance(built[0].model.objective, GRPO) and built[0].model.objective.kl_coef == 0.1


def test_the_readmes_python_runs() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    found: dict[str, Any] = {}
    exec(block, found)
    assert found["policy"].objective.kl_coef == 0.1


def test_the_readmes_table_of_variants_is_true() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (?:`(\{.*?\})`)? *\|$", README, re.M)
    others = set(re.findall(r"^\| \*\*(\w+)\*\* \|", README, re.M))
    assert {name for name, _ in rows} | others == set(lit_palm_grpo.__all__)
    for name, options in rows:
        variant = getattr(lit_palm_grpo, name)
        assert vars(variant()) == vars(GRPO(**yaml.safe_load(options or "{}"))), name
