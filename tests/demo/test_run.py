"""The recipes as a user runs them: commands, folders, and a short run of everything that needs no download."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from lit_palm.demo.run import addition_recipe, overrides, plugin_rows, ratings_recipe, relocate
from lit_palm.testing.processes import Program

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def all_rows() -> list[Path]:
    """The rows of all packages, installed or not."""
    return plugin_rows() + plugin_rows(installed=False)


def test_a_package_adds_its_row_to_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, objective in (("mine", "PPO"), ("yours", "lit_palm_nobody.NotInstalled")):
        config = tmp_path / f"plugins/lit-palm-{name}/configs/demo/{name}.yaml"
        config.parent.mkdir(parents=True)
        config.write_text(f"model: {{class_path: LitPolicy, init_args: {{objective: {{class_path: {objective}}}}}}}")
    monkeypatch.chdir(tmp_path)
    (mine,), (yours,) = plugin_rows(), plugin_rows(installed=False)
    assert (mine.stem, yours.stem) == ("mine", "yours")
    recipe = ratings_recipe([mine])
    assert ("mine", ["lit-palm", "fit", "--config", str(mine)]) in recipe
    assert any("--model.network=runs/demo/mine/last.ckpt" in command for _, command in recipe)
    assert "mine=runs/demo/samples/mine.jsonl" in recipe[-1][1], "measured beside the others"
    assert not any("mine" in argument for _, command in ratings_recipe() for argument in command)


def test_every_configuration_a_recipe_names_exists() -> None:
    assert len(all_rows()) >= 4
    for _, command in [*ratings_recipe(all_rows()), *addition_recipe()]:
        for argument in command:
            if argument.endswith(".yaml"):
                assert (ROOT / argument).is_file(), argument


def test_relocate_moves_every_path_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = str(tmp_path / "elsewhere")
    for _, command in ratings_recipe(all_rows()):
        moved = relocate(command, "runs/demo", target)
        assert not any("runs/demo/" in argument for argument in moved), moved
        for argument in moved:
            if argument.endswith(".yaml"):
                assert "runs/demo/" not in str(yaml.safe_load(Path(argument).read_text()))


def test_overrides_set_the_seed_of_every_random_choice() -> None:
    fits = [c for _, c in ratings_recipe(all_rows()) if c[:2] == ["lit-palm", "fit"]]
    for command in fits:
        extra = overrides(command, seed=3, fast=False)
        assert "--seed_everything=3" in extra and "--data.seed=3" in extra
        assert ("--model.rollout.seed=3" in extra) == ("ppo" in command[3] or "plugins/" in command[3])
        assert overrides(command, seed=0, fast=False) == []


def test_short_run_of_the_addition_recipe(tmp_path: Path) -> None:
    target = tmp_path / "addition"
    arguments = ["run", "--recipe", "addition", "--fast", "--folder", str(target)]
    environment = os.environ | {"LIT_PALM_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = Program("lit_palm.demo", arguments, tmp_path / "log", environment, ROOT).finish(600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    seconds = json.loads((target / "seconds.json").read_text())
    assert set(seconds) == {"total", "core", *(stage for stage, _ in addition_recipe())}
    assert (target / "ppo" / "last.ckpt").is_file()
    assert list(target.rglob("events.out.tfevents.*")), "no TensorBoard files"
