"""The YAML files and the README's run parse, and build what they name; comments give the defaults."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lit_palm_implicit_reward import ImplicitPRM, ImplicitProcessReward

from lit_palm.cli import main

HERE = Path(__file__).parents[1]
README = (HERE / "README.md").read_text(encoding="utf-8")
FILES = sorted((HERE / "configs").glob("*.yaml"))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[LightningCLI]:
    """Command lines that were parsed and built, instead of run."""
    found: list[LightningCLI] = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: found.append(cli))
    return found


def arguments_of(path: Path) -> dict[str, Any]:
    """Of the class that the file is about."""
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"]
    about = model["objective"] if path.stem == "implicit-prm" else model["rewards"][0]
    arguments: dict[str, Any] = about["init_args"]
    return arguments


def plain(made: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(made).items() if name != "network"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_builds_by_its_own_command(
    path: Path, built: list[LightningCLI], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE.parents[1])
    shown = re.search(r"^#   lit-palm (fit .*)$", path.read_text(encoding="utf-8"), re.M)
    assert shown and f"plugins/lit-palm-implicit-reward/configs/{path.name}" in shown.group(1)
    assert f"lit-palm {shown.group(1)}" in README
    words = [*shlex.split(shown.group(1)), "--trainer.accelerator=cpu", "--trainer.logger=false"]
    assert main(words) == 0, capsys.readouterr().err
    model = built[0].model
    if path.stem == "implicit-prm":
        assert plain(model.objective) == plain(ImplicitPRM(**arguments_of(path)))
    else:
        assert plain(model.rewards[0]) == plain(ImplicitProcessReward(**arguments_of(path)))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_comments_after_arguments_give_their_defaults(path: Path) -> None:
    cls: Any = ImplicitPRM if path.stem == "implicit-prm" else ImplicitProcessReward
    defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
    text = path.read_text(encoding="utf-8").split(cls.__name__)[1].split("optimizer:")[0]
    shown = dict(re.findall(r"^ {8,10}(\w+): .*default ([\w.]+)\)", text, re.M))
    given = arguments_of(path)
    assert set(given) == set(defaults) - {"name"}
    for name, value in shown.items():
        assert yaml.safe_load(value) == defaults[name] == given[name], name
    assert set(given) - set(shown) <= {"checkpoint", "reference", "delimiter"}


def test_the_readmes_run_builds(
    built: list[LightningCLI], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    (tmp_path / "run.yaml").write_text(block, encoding="utf-8")
    assert main(["fit", "--config", "run.yaml", "--trainer.logger=false"]) == 0, capsys.readouterr().err
    (python,) = re.findall(r"```python\n(.*?)```", README, re.S)
    found: dict[str, Any] = {}
    exec(python, found)
    for mine, theirs in zip(built[0].model.rewards, found["policy"].rewards, strict=True):
        assert plain(mine) == plain(theirs)
    for name in inspect.signature(ImplicitProcessReward).parameters:
        assert f"`{name}" in README or f"{name}:" in README or name in ("name", "weight", "batch_size"), name
