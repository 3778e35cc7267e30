"""`lit-palm new-objective`: the package it writes installs, trains and passes its tests as it stands, anywhere.

The short form installs the wheel of each kind into a folder of its own and runs there, outside the repository. The
slow one does it as a stranger would: lit_palm and the wheel in an environment that holds nothing else.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from lit_palm import plugins
from lit_palm.cli import main
from lit_palm.scaffold import KINDS, Author, check_free, names_for, render, write_package
from lit_palm.scaffold.package import imported_names

ROOT = Path(__file__).parents[1]

New = Callable[..., tuple[int, str, str]]


@pytest.fixture
def new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[New]:
    """new("my-loss", ...) -> (exit status, stdout, stderr) of `lit-palm new-objective` in a folder of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    plugins.discover.cache_clear()

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = main(["new-objective", *arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    yield run
    plugins.discover.cache_clear()


# ---------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "text, distribution, module, class_name",
    [
        ("my-loss", "lit-palm-my-loss", "lit_palm_my_loss", "MyLoss"),
        ("my_loss", "lit-palm-my-loss", "lit_palm_my_loss", "MyLoss"),
        ("MyLoss", "lit-palm-my-loss", "lit_palm_my_loss", "MyLoss"),
        ("lit-palm-my-loss", "lit-palm-my-loss", "lit_palm_my_loss", "MyLoss"),
        ("lit_palm_my_loss", "lit-palm-my-loss", "lit_palm_my_loss", "MyLoss"),
        ("loss", "lit-palm-loss", "lit_palm_loss", "Loss"),
        ("XYZ", "lit-palm-xyz", "lit_palm_xyz", "XYZ"),
        ("MyXYZLoss2", "lit-palm-my-xyz-loss2", "lit_palm_my_xyz_loss2", "MyXYZLoss2"),
        ("my-XYZ", "lit-palm-my-xyz", "lit_palm_my_xyz", "MyXYZ"),
        ("two-2b", "lit-palm-two-2b", "lit_palm_two_2b", "Two2b"),
    ],
)
def test_one_name_gives_all_others(text: str, distribution: str, module: str, class_name: str) -> None:
    names = names_for(text)
    assert (names.distribution, names.module, names.class_name) == (distribution, module, class_name)
    assert names.name == module.removeprefix("lit_palm_")
    assert names.class_name.isidentifier() and names.module.isidentifier()


BAD = {
    "": "is no name for an objective",
    "2fast": "is no name for an objective",
    "my.loss": "is no name for an objective",
    "my loss": "is no name for an objective",
    "my/loss": "is no name for an objective",
    "../loss": "is no name for an objective",
    "my--loss": "is no name for an objective",
    "my-loss-": "is no name for an objective",
    "lit-palm-": "is no name for an objective",
    "größe": "is no name for an objective",
    "class": "is a keyword of Python",
    "none": "is a keyword of Python",
    "value-error": "is a name of Python's own",
    "x" * 41: "has 41 characters",
    "PPO": r"PPO is taken: lit_palm .* brings the objective PPO; choose another name",
    "ppo": r"Ppo is taken: lit_palm .* brings the objective PPO, which differs only in capitals",
    "reward-model": "RewardModel is taken: lit_palm .* brings the reward RewardModel",
    "objective": "Objective is a name that every objective imports",
    "loss": "Loss is a name that every objective imports",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_name_is_one_clear_line_and_writes_nothing(name: str, new: New, tmp_path: Path) -> None:
    status, out, err = new("--", name) if name.startswith("-") else new(name)
    assert status == 2 and out == "" and list(tmp_path.iterdir()) == []
    assert err.startswith("lit-palm: error: ") and err.count("\n") == 1
    assert re.search(BAD[name], err), err


def test_an_installed_plugin_is_not_shadowed(new: New, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    info = site / "someones_package-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: someones-package\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text("[lit_palm.objectives]\nTinyTaken = nowhere:TinyTaken\n")
    other = site / "lit_palm_tiny_other-0.4.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: lit-palm-tiny-other\nVersion: 0.4\n")
    (site / "lit_palm_tiny_third.py").write_text("")
    monkeypatch.syspath_prepend(str(site))
    plugins.discover.cache_clear()
    status, _, err = new("tiny-taken")
    assert status == 2 and "TinyTaken is taken: someones-package 0.3 brings the objective TinyTaken" in err
    status, _, err = new("tiny-other")
    assert status == 2 and "lit-palm-tiny-other 0.4 is installed already" in err
    status, _, err = new("tiny-third")
    assert status == 2 and "a module lit_palm_tiny_third can be imported already" in err
    check_free(names_for("tiny-fourth"))


def test_a_class_of_its_name_would_hide_none_of_its_imports() -> None:
    for kind in KINDS:
        source = render(names_for("tiny-x"), kind)["lit_palm_tiny_x/objective.py"]
        used = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        assert {"Objective", "Loss", "Tensor", "torch"} <= imported_names(kind) & used


# ---------------------------------------------------------------------------------------------------- folders


def test_an_existing_folder_is_left_alone(new: New, tmp_path: Path) -> None:
    (tmp_path / "lit-palm-tiny-a").mkdir()
    (tmp_path / "lit-palm-tiny-a" / "mine.txt").write_text("mine")
    status, _, err = new("tiny-a")
    assert status == 2 and "lit-palm-tiny-a exists already" in err and "--output" in err
    assert [path.name for path in tmp_path.rglob("*")] == ["lit-palm-tiny-a", "mine.txt"]
    assert new("tiny-a", "--output", "elsewhere/deep")[0] == 0
    assert (tmp_path / "elsewhere/deep/lit-palm-tiny-a/pyproject.toml").is_file()


def test_a_folder_that_cannot_be_written_is_an_error(new: New, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = new("tiny-a", "--output", "file")
    assert status == 2 and "cannot be written" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_written_half_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Path.write_text

    def full(path: Path, *args: object, **options: object) -> int:
        if path.suffix == ".yaml":
            raise OSError(28, "No space left on device")
        return write(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ValueError, match="No space left on device"):
        write_package(names_for("tiny-a"), "offline", tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_well_formed(kind: str, new: New, tmp_path: Path) -> None:
    status, out, _ = new("tiny-written", "--kind", kind, "--author", 'Ada "Æ" Lovelace <ada@example.org>')
    folder = tmp_path / "lit-palm-tiny-written"
    assert status == 0
    for step in ("cd lit-palm-tiny-written", 'pip install -e ".[test]"', "pytest", "lit-palm fit --config configs/"):
        assert step in out
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["lit_palm.objectives"] == {"TinyWritten": "lit_palm_tiny_written:TinyWritten"}
    assert project["dependencies"] == ["lit-palm>=0.1,<0.2"] and project["license"] == "Apache-2.0"
    assert project["authors"] == [{"name": "Ada Æ Lovelace", "email": "ada@example.org"}]
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    for path in folder.rglob("*"):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            assert "$" not in text, path  # nothing left to fill in
            assert path.name == "py.typed" or text.endswith("\n")
    source = (folder / "lit_palm_tiny_written/objective.py").read_text()
    assert source.count("---- your objective: replace from here") >= 1
    (stated,) = re.findall(r"^    API_VERSION: ClassVar\[int\] = (\d+)$", source, re.MULTILINE)
    assert int(stated) == plugins.load("objective", "PPO").API_VERSION
    for line in (folder / "configs/tiny_written.yaml").read_text().splitlines():
        assert len(line) <= 120
    config = yaml.safe_load((folder / "configs/tiny_written.yaml").read_text())
    assert (folder / config["data"]["init_args"]["train"]).is_file()
    # whoever writes a package wants it clean from the start
    for command in (["check", "--select", "E,F,I,UP,B,SIM,RUF,W,C4,PIE"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length=120", "--target-version=py311", "."],
            cwd=folder, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("text", ["", " ", "Ada <nowhere>", "Ada\nLovelace", "<ada@example.org>"])
def test_an_author_is_a_name_or_a_name_with_an_address(text: str) -> None:
    with pytest.raises(ValueError, match="write it as 'Ada Lovelace'"):
        Author.parse(text)
    assert Author.parse("Ada Lovelace").toml() == 'authors = [{ name = "Ada Lovelace" }]'


@pytest.mark.slow
def test_the_modules_are_typed(tmp_path: Path) -> None:
    folders = [write_package(names_for(f"tiny-{kind}"), kind, tmp_path) for kind in KINDS]  # type: ignore[arg-type]
    modules = [str(folder / folder.name.replace("-", "_")) for folder in folders]
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", *modules]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------------- as a package


def shell(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a command outside the repository; its output. What it may import of plugins is in PYTHONPATH alone."""
    dropped = ("PYTHONPATH", "LIT_PALM_PLUGINS", "PL_GLOBAL_SEED")
    surroundings = {k: v for k, v in os.environ.items() if k not in dropped}
    env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "LIT_PALM_CACHE": str(cwd / ".cache"), **env}
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, env={**surroundings, **env})
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds as wheels in `site`, and their tests, configurations and data in a folder without their modules."""
    folder = tmp_path_factory.mktemp("moved")
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist"]
    for kind in KINDS:
        project = write_package(names_for(f"tiny-{kind}"), kind, folder)  # type: ignore[arg-type]
        shell(*wheel, project, cwd=folder)
        shutil.rmtree(project / f"lit_palm_tiny_{kind}")
        shutil.rmtree(project / "build")
    wheels = sorted((folder / "dist").glob("*.whl"))
    assert len(wheels) == 2
    shell(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", "site", *wheels, cwd=folder)
    return folder


def test_installed_wheels_train_and_pass_their_tests(moved: Path) -> None:
    """Both in one process, which imports torch once, outside the repository; the slow form leaves out nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "not two_processes and not command_line"]
    folders = [f"lit-palm-tiny-{kind}/tests" for kind in KINDS]
    out = shell(*command, *folders, cwd=moved, PYTHONPATH=f"{moved / 'site'}{os.pathsep}{ROOT}")
    assert int(re.findall(r"(\d+) passed", out)[0]) >= 40 and "failed" not in out


def test_its_arguments_are_typed_and_documented(moved: Path) -> None:
    """In one process, which imports torch once: the listing, and the two kinds of help."""
    code = """
        import sys
        from lit_palm.cli import main
        def say(*argv):
            try:
                main(list(argv))
            except SystemExit as stop:
                assert stop.code in (None, 0), stop.code
        say("plugins")
        say("plugins", "show", "TinyOffline")
        say("fit", "--model.objective.help", "TinyOffline")
        print("online is imported:", "lit_palm_tiny_online" in sys.modules)
    """
    environment = {"PYTHONPATH": f"{moved / 'site'}{os.pathsep}{ROOT}", "COLUMNS": "120"}
    out = shell(sys.executable, "-c", textwrap.dedent(code), cwd=moved, **environment)
    table, shown, helped = re.split(r"^TinyOffline: objective.*\n|^usage: ", out, flags=re.MULTILINE)
    assert "TinyOnline" in table and "lit-palm-tiny-offline" in table
    assert "beta: float = 0.1\n      how much one nat of difference from the reference counts." in shown
    assert "--objective.beta BETA" in helped
    assert "how much one nat of difference from the reference counts. (type: float, default: 0.1)" in helped
    assert "online is imported: True" in helped  # a listing imports all; test_plugins.py has what a run imports


@pytest.mark.slow
def test_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """lit_palm from the repository, the package as a wheel, and nothing else that is not required."""
    venv.create(tmp_path / "env", with_pip=True)
    binary = tmp_path / "env" / "bin"
    pip = [binary / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    source = tmp_path / "source"  # a build in the repository would leave its traces there
    ignore = shutil.ignore_patterns(".git", ".venv", "runs", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignore)
    shell(*pip, source, cwd=tmp_path)
    for kind in KINDS:
        shell(binary / "lit-palm", "new-objective", f"fresh-{kind}", "--kind", kind, cwd=tmp_path)
        project = tmp_path / f"lit-palm-fresh-{kind}"
        shell(binary / "python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", "dist", project, cwd=tmp_path)
        (wheel,) = (tmp_path / "dist").glob(f"lit_palm_fresh_{kind}-*.whl")
        shell(*pip, f"{wheel}[test]", cwd=tmp_path)
        shutil.rmtree(project / f"lit_palm_fresh_{kind}")
        config = f"configs/fresh_{kind}.yaml"
        shell(binary / "lit-palm", "fit", "--config", config, "--trainer.accelerator=cpu", cwd=project)
        saved = torch.load(project / f"runs/fresh_{kind}/last.ckpt", weights_only=True)
        assert saved["global_step"] > 0
        shell(binary / "python", "-m", "pytest", "-q", cwd=project)
