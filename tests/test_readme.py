"""The README keeps its word: commands that somebody runs, snippets that run, names and files that exist.

The commands themselves are run by CI after the recipes (tests/run_readme.py). Here they are only looked at, the Python
snippets are run, and the overlays laid over what they are for (tests/test_configs.py has each file by itself).
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_palm import cli
from lit_palm.demo.run import addition_recipe, plugin_rows, ratings_recipe
from lit_palm.models.palm import PRESETS, PaLMConfig
from lit_palm.plugins import plugin_table
from tests.modules import test_logged_names as logged
from tests.run_readme import forkable, readme_commands, who_runs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = readme_commands(README)

STAGES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
SIZES = sorted(path.stem for path in (ROOT / "configs/palm").glob("*.yaml"))
STRATEGIES = sorted(path.stem for path in (ROOT / "configs/strategy").glob("*.yaml"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


# ---- commands


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_run_by_somebody(command: str) -> None:
    who = who_runs(command)
    assert who in ("ci", "demo", "here", "elsewhere")
    if who == "here":  # what nobody has run before must not write where the demo's results are
        last = re.sub(r"^echo [^|]*\| ", "", command)
        words = [word for word in shlex.split(last, comments=True) if not re.match(r"[A-Z_]+=", word)]
        if words[:2] == ["python", "-c"]:  # makes a file that the next command reads
            return
        assert words[0] == "lit-palm"
        assert words[1] in {"fit", "validate", "test", "predict", *cli.EXTRA_VERBS}
        config = " ".join(word for word in words if word.startswith("configs/demo/"))
        harmless = "--print_config" in words or "--trainer.callbacks=null" in words
        assert words[1] != "fit" or not config or harmless, "this would overwrite a checkpoint of the recipe"


def test_a_shell_runs_each_verb_and_all_that_is_not_plain() -> None:
    known: set[str] = set()
    assert forkable('lit-palm generate --prompt "a b"', known) is None and known == {"generate"}
    assert forkable('lit-palm generate --prompt "a b" # a word', known) == ["generate", "--prompt", "a b"]
    for command in ("echo a | lit-palm generate", "A=b lit-palm generate", "lit-palm generate > file",
                    "lit-palm generate --trainer.devices=2", "lit-palm plugins"):  # fmt: skip
        assert forkable(command, known) is None, command


def test_the_recipes_are_shown_whole() -> None:
    shown = [shlex.join(shlex.split(command, comments=True)) for command in COMMANDS]
    rows = sorted(plugin_rows() + plugin_rows(installed=False))
    recipes = [shlex.join(command) for recipe in (ratings_recipe(rows), addition_recipe()) for _, command in recipe]
    places = [shown.index(command) for command in recipes]
    assert places == sorted(places), "and in their order"


# ---- snippets

RUNNER = """
import json, os, runpy, sys
for path in sys.argv[1:]:
    print("running", path, file=sys.stderr)
    spaces = runpy.run_path(path)
    if "exact" in spaces:
        from lit_palm import PythonReward
        reward = PythonReward(spaces["exact"])
        assert list(reward._accepts) == ["completions", "answer"]
        assert spaces["exact"](completions=[" 7", "8"], answer=["7", "7"]) == [1.0, 0.0]
    for name, kind in (("Brevity", "reward"), ("Reinforce", "objective")):
        if name in spaces:
            from lit_palm.plugins import check_class
            check_class(kind, spaces[name])  # a plugin as it stands
    if "Brevity" in spaces:
        brevity = spaces["Brevity"]()
    if "Reinforce" in spaces:
        from pathlib import Path
        import torch
        from tests.support import policy, prompt_data, trainer
        objective, scores = spaces["Reinforce"](), []
        prepare = objective.prepare
        def watched(experience):
            scores.append(experience["scores"].mean().item())
            return prepare(experience)
        objective.prepare = watched
        module = policy(objective=objective, rewards=[brevity], rollout={"num_prompts": 64, "minibatch_size": 16},
                        optimizer=lambda groups: torch.optim.Adam(groups, lr=1e-2))
        trainer(".", max_epochs=8).fit(module, datamodule=prompt_data(Path("data")))
        print(json.dumps(scores))
"""


def test_snippets_run_as_they_stand(tmp_path: Path) -> None:
    """In one process of their own, each with names of its own; the reward and the objective also do what they say."""
    paths = []
    for number, block in enumerate(blocks("python")):
        paths.append(tmp_path / f"snippet_{number}.py")
        paths[-1].write_text(block, encoding="utf-8")
    assert len(paths) >= 5
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "LIT_PALM_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", RUNNER, *map(str, paths)], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    # from 64 rows of one to eight tokens a mean is known to about 0.4
    assert scores[-1] > scores[0] + 1.0, f"the objective does not raise the reward: {scores}"


# ---- names


def string_constants() -> set[str]:
    """Every text in the sources, with NAME for what an f-string fills in."""
    found = set()
    for path in (ROOT / "lit_palm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(v.value if isinstance(v, ast.Constant) else "NAME" for v in node.values))
    return found


def metric_names() -> list[str]:
    """The names in the table of the section on TensorBoard."""
    section = README.split("\n## TensorBoard\n")[1].split("\n## ")[0]
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("|") and "---" not in line]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row) if not name.endswith("/")]


def test_metrics_in_the_readme_are_logged() -> None:
    texts = string_constants()
    names = metric_names()
    assert len(names) > 40
    for name in names:
        phase = re.fullmatch(r"time/(\w+)_s", name)
        timed = phase is not None and "time/NAME_s" in texts and phase[1] in texts
        assert name in texts or name.removeprefix("val/") in texts or timed, f"nothing logs {name}"


def test_metrics_that_people_look_for_are_in_the_readme() -> None:
    names = set(metric_names())
    for name in logged.ALL | logged.LANGUAGE_MODEL | logged.REWARD | logged.POLICY:
        general = re.sub("lower_case|count_a", "NAME", name)
        # the reward model's are listed once, "and the same under val/"
        assert general in names or general.removeprefix("val/") in names, name


def test_plugins_are_those_of_a_real_listing() -> None:
    shown = re.search(r"<!-- plugins-output -->\n```text\n(.*?)```\n<!-- /plugins-output -->", README, re.DOTALL)
    assert shown
    lines = [line.split() for line in shown.group(1).splitlines()]
    real = [[p.name, p.kind, p.distribution, p.version, str(p.api), p.health] for p in plugin_table()]
    assert [line for line in lines[1:] if line[2] == "lit_palm"] == [line for line in real if line[2] == "lit_palm"]
    packages = [tomllib.loads(path.read_text())["project"] for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))]
    brought = {
        (name, package["name"], package["version"])
        for package in packages
        for group in package["entry-points"].values()
        for name in group
    }
    assert {(line[0], *line[2:4]) for line in lines[1:] if line[2] != "lit_palm"} == brought


def test_links_and_files_exist() -> None:
    titles = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert target[1:] in anchors if target.startswith("#") else (ROOT / target).exists(), target
    for path in re.findall(r"(?<![\w/-])(?:configs|lit_palm|plugins|tests)/[\w./-]*[\w/]", README):
        assert "NAME" in path or (ROOT / path).exists(), path
    for name in [*STAGES, *(f"palm/{s}" for s in SIZES), *(f"strategy/{s}" for s in STRATEGIES)]:
        assert f"configs/{name}.yaml" in README, f"configs/{name}.yaml is not in the README"
    assert README.index("<!-- demo-output -->") < README.index("<!-- /demo-output -->")


# ---- configurations


class _Parser(Exception):
    """Carries the parser out of the command line, which is slow to build and needed many times."""


@pytest.fixture(scope="module")
def parser() -> Any:
    """The parser of `lit-palm`, as the command line makes it."""

    def give(self: Any, parser: Any, args: Any) -> None:
        raise _Parser(parser)

    kind = cli.build_cli()
    kind.parse_arguments = give
    argv = list(sys.argv)
    try:
        kind()
    except _Parser as caught:
        return caught.args[0]
    finally:
        sys.argv[:] = argv
    raise AssertionError("the command line parsed nothing")


def printed(parser: Any, capsys: pytest.CaptureFixture[str], *names: str) -> dict[tuple[str, ...], Any]:
    """What `lit-palm fit --print_config` says of configs/NAME.yaml under overlays, by the path of keys."""
    flags = [flag for name in names for flag in ("--config", str(ROOT / f"configs/{name}.yaml"))]
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["fit", *flags, "--print_config"])
    out, err = capsys.readouterr()
    assert stop.value.code in (None, 0), err
    return dict(leaves(yaml.safe_load(out)))


def read(name: str) -> dict[tuple[str, ...], Any]:
    return dict(leaves(yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))))


def leaves(tree: Any, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from leaves(value, *path, key)
    else:
        yield path, tree


def plain(value: Any) -> Any:
    """A class path by its class name, since short names come back whole."""
    return value.rpartition(".")[2] if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w.]+", value) else value


def check_kept(given: dict[tuple[str, ...], Any], result: dict[tuple[str, ...], Any]) -> None:
    """Everything that files gave is in the result (save inside lists, whose members gain defaults)."""
    for path, value in given.items():
        if not isinstance(value, list):
            found = result[path] if path in result else result[*path, "class_path"]
            assert plain(found) == plain(value), ".".join(path)


@pytest.mark.parametrize(
    "stage, overlay",
    [*(("pretrain", f"palm/{size}") for size in SIZES), *(("ppo", f"strategy/{name}") for name in STRATEGIES)],
)
def test_an_overlay_changes_what_it_names_and_nothing_else(
    stage: str, overlay: str, parser: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = printed(parser, capsys, stage), printed(parser, capsys, stage, overlay)
    named = read(overlay)
    check_kept(named, after)
    # a class in place of a short name, and of null: all of it is the overlay's
    whole = [("trainer", "strategy"), ("model", "init_args", "sharding")] if overlay.startswith("strategy") else []

    def others(leaves: dict[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
        return {k: v for k, v in leaves.items() if k not in named and not any(k[: len(w)] == w for w in whole)}

    assert others(before) == others(after)
    assert any(before.get(path) != after.get(path) for path in named) or overlay == "palm/30m"  # which is the default
    keys = [("trainer",), *whole] if whole else [("model", "init_args", "network")]
    assert all(any(path[: len(key)] == key for key in keys) for path in named)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_the_presets(size: str) -> None:
    network = yaml.safe_load((ROOT / f"configs/palm/{size}.yaml").read_text())["model"]["init_args"]["network"]
    assert network["class_path"] == "PaLMConfig"
    free = {"vocab_size": None, "activation_checkpointing": False, "max_length": 2048}
    assert PaLMConfig(**{**network["init_args"], **free}) == PaLMConfig.preset(size, **free)
    assert set(SIZES) == set(PRESETS)
