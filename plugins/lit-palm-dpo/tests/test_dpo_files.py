"""The YAML files, and what the README says: both parse and build what they name, and its tables are complete."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import lit_palm_dpo
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lit_palm_dpo import DPO, KTO, OnlineDPO
from lit_palm_dpo.dpo import LossName

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


def objective_of(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["init_args"]["objective"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_a_file_builds_by_its_own_command(
    path: Path, built: list[LightningCLI], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE.parents[1])
    shown = re.search(r"^#   lit-palm (fit .*)$", path.read_text(encoding="utf-8"), re.M)
    assert shown and f"plugins/lit-palm-dpo/configs/{path.name}" in shown.group(1)
    words = [*shlex.split(shown.group(1)), "--trainer.accelerator=cpu", "--trainer.logger=false"]
    assert main(words) == 0, capsys.readouterr().err
    expected: Any = {"dpo": DPO, "kto": KTO, "online-dpo": OnlineDPO}[path.stem]
    found = built[0].model.objective
    assert type(found) is expected and vars(found) == vars(expected(**objective_of(path)["init_args"]))


def test_the_comments_after_arguments_give_their_defaults() -> None:
    """Where a file says nothing else, what it sets is the default."""
    for path in FILES:
        block = path.read_text(encoding="utf-8").split("objective:")[1].split("optimizer:")[0].split("rewards:")[0]
        shown = re.findall(r"^ {8}(\w+): .*default ([\w.]+)", block, re.M)
        cls = getattr(lit_palm_dpo, objective_of(path)["class_path"])
        assert shown and {name for name, _ in shown} == set(objective_of(path)["init_args"])
        stated = {name: yaml.safe_load(text.rstrip(".")) for name, text in shown}
        assert vars(cls(**stated)) == vars(cls()), path.name
    arguments = set(objective_of(HERE / "configs/dpo.yaml")["init_args"])
    assert arguments == set(DPO.__init__.__annotations__) - {"return"}


def test_other_objectives_take_the_place_of_the_first_by_a_flag(
    built: list[LightningCLI], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(HERE.parents[1])
    text = (HERE / "configs/dpo.yaml").read_text(encoding="utf-8")
    flags = re.findall(r"--model\.objective\S*", text)
    assert flags
    words = ["fit", "--config", "plugins/lit-palm-dpo/configs/dpo.yaml", *flags]
    assert main([*words, "--trainer.accelerator=cpu", "--trainer.logger=false"]) == 0, capsys.readouterr().err
    assert vars(built[0].model.objective) == vars(lit_palm_dpo.SimPO())


def test_the_readmes_run_builds(
    tmp_path: Path, built: list[LightningCLI], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    (tmp_path / "run.yaml").write_text(block, encoding="utf-8")
    assert main(["fit", "--config", "run.yaml", "--trainer.logger=false"]) == 0, capsys.readouterr().err
    (python,) = re.findall(r"```python\n(.*?)```", README, re.S)
    found: dict[str, Any] = {}
    exec(python, found)
    assert vars(built[0].model.objective) == vars(found["policy"].objective)


def test_the_readmes_tables_name_every_loss_and_every_class() -> None:
    rows = {name for line in README.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line.split("|")[1])}  # noqa: E501  # fmt: skip
    assert rows >= set(get_args(LossName)) | set(lit_palm_dpo.__all__)
    for name in set(DPO.__init__.__annotations__) - {"return", "alpha", "loss_weights", "losses"}:
        assert f"`{name}`" in README or f"`{name}:" in README, name
