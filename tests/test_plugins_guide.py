"""plugins/README.md keeps its word: every snippet is run, in its order, in a folder and an environment of its own.

The rules, by the language of a block:

    bash     run with `bash -eu`; a `cd` stays for the blocks after it. Lines with `# publishes` would leave this
             machine: bash only reads them.
    python   run as a script; a block that opens with `# path.py` is written to that file instead, for a command to use
    yaml     written to the file that its first line names, laid over the package's configuration and parsed by the CLI
    toml     must be in the package's pyproject.toml as it is
    diff     applied with `git apply`

The environment sees what is installed beside the tests and takes nothing from an index, so `pip install` is real and
leaves no trace. The short form leaves out what builds the whole command line or trains, several seconds each: `lit-palm
fit`, a bare `pytest`, and parsing YAML; and it runs all scripts in one process. The slow form leaves out nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "plugins" / "README.md"
PUBLISHES = "# publishes"
SECONDS_EACH = re.compile(r"^(\w+=\S* )*(lit-palm fit\b|pytest$)")
"""Commands of the slow form."""


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(m.group(1), m.group(2), text[: m.start()].count("\n") + 1) for m in found]


class Reader:
    """Somebody who follows the guide to the letter."""

    def __init__(self, folder: Path, whole: bool) -> None:
        self.whole = whole
        self.scripts: list[str] = []
        self.folder = folder / "work"
        self.folder.mkdir()
        self.before = folder / "cwd"
        venv.create(folder / "env", symlinks=True)
        self.python = folder / "env" / "bin" / "python"
        inner = next((folder / "env" / "lib").glob("python*")) / "site-packages"
        # what is installed beside the tests, with its editable installs
        outer = sysconfig.get_paths()["purelib"]
        (inner / "beside.pth").write_text(f"import site; site.addsitedir({outer!r})\n{ROOT}\n")
        for name in ("pip", "pytest", "lit_palm"):
            script = self.python.with_name(name.replace("_", "-"))
            script.write_text(f'#!/bin/sh\nexec "{self.python}" -m {name} "$@"\n')
            script.chmod(0o755)
        dropped = ("PYTHONPATH", "LIT_PALM_PLUGINS", "LIT_PALM_TRACEBACK", "PYTEST_ADDOPTS", "PL_GLOBAL_SEED")
        self.environment = {k: v for k, v in os.environ.items() if k not in dropped} | {
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ['PATH']}",
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip reads this one the other way round
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTEST_ADDOPTS": "-q -p no:cacheprovider",
            "LIT_PALM_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def run(self, *command: str | Path, text: str = "") -> str:
        done = subprocess.run(
            [*map(str, command)], cwd=self.folder, env=self.environment, input=text, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{text}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def bash(self, text: str) -> str:
        self.run("bash", "-n", text=text)
        lines = [line for line in text.splitlines() if PUBLISHES not in line]
        kept = "\n".join(line for line in lines if self.whole or not SECONDS_EACH.match(line))
        out = self.run("bash", "-euo", "pipefail", "-c", f'{kept}\npwd > "{self.before}"')
        self.folder = Path(self.before.read_text().strip())
        return out

    def run_scripts(self) -> str:
        """Those that wait, each with names of its own."""
        code = "".join(f"exec({script!r}, {{'__name__': '__main__'}})\n" for script in self.scripts)
        self.scripts = []
        return self.run(self.python, "-", text=code)

    def write(self, text: str) -> Path | None:
        """Write a block to the file that its first line names."""
        named = re.match(r"# ([\w/.-]+\.(?:py|yaml))\n", text)
        if named:
            (self.folder / named.group(1)).write_text(text)
        return Path(named.group(1)) if named else None

    def follow(self, block: Block) -> str:
        if block.language == "bash":
            return self.bash(block.text)
        if block.language == "python":
            if not self.write(block.text):
                self.scripts.append(block.text)
                return self.run_scripts() if self.whole else ""
            return ""
        if block.language == "yaml":
            path = self.write(block.text)
            assert path, "say in its first line which file it is"
            configs = ["--config", f"configs/{self.folder.name.removeprefix('lit-palm-')}.yaml", "--config", str(path)]
            return self.run("lit-palm", "fit", *configs, "--print_config") if self.whole else ""
        if block.language == "toml":
            project = tomllib.loads((self.folder / "pyproject.toml").read_text())
            assert contains(project, tomllib.loads(block.text))
            return ""
        assert block.language == "diff", f"what is to be done with {block.language}?"
        return self.run("git", "apply", "--verbose", "-", text=block.text)


def contains(whole: object, part: object) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(contains(whole.get(key), value) for key, value in part.items())
    return whole == part


def follow(folder: Path, whole: bool) -> tuple[Reader, dict[str, str]]:
    """Somebody who has read to the end, and what each block said."""
    reader, said = Reader(folder, whole), {}
    for block in blocks(GUIDE.read_text(encoding="utf-8")):
        try:
            said[block.text] = reader.follow(block)
        except AssertionError as error:
            raise AssertionError(f"plugins/README.md, line {block.line}: {error}") from error
    reader.run_scripts()
    shown = next(out for text, out in said.items() if "plugins show Focus" in text)
    assert "gamma: float = 0.0\n      how much less a pair counts that is told apart already" in shown
    assert re.search(r"^Focus +objective +lit-palm-focus +0\.1\.0 +1 +healthy$", shown, re.MULTILINE)
    assert list((reader.folder / "dist").glob("lit_palm_focus-0.1.0-*.whl"))
    # the tests of the package, with two files that the guide has added
    assert len(list((reader.folder / "tests").glob("test_*.py"))) == 4
    # and nothing has reached the environment of the tests
    assert not list(Path(sysconfig.get_paths()["purelib"]).glob("*lit_palm_focus*"))
    return reader, said


def test_the_guide_works_from_top_to_bottom(tmp_path: Path) -> None:
    reader, _ = follow(tmp_path, whole=False)
    # of what a bare pytest runs, what has no network
    reader.run("pytest", "tests/test_focus_gamma.py", "tests/test_focus.py", "-k", "not configuration")


@pytest.mark.slow
def test_the_guide_works_whole(tmp_path: Path) -> None:
    reader, said = follow(tmp_path, whole=True)
    tests = next(out for text, out in said.items() if text == "pytest\n")
    assert int(re.findall(r"(\d+) passed", tests)[0]) >= 25
    helped = next(out for text, out in said.items() if "objective.help" in text)
    assert "--objective.gamma GAMMA" in helped
    assert (reader.folder / "runs" / "focus" / "last.ckpt").is_file()


def test_only_what_leaves_the_machine_is_not_run() -> None:
    commands = [block.text for block in blocks(GUIDE.read_text(encoding="utf-8")) if block.language == "bash"]
    lines = "".join(commands).splitlines()
    skipped = [line.split("#")[0].split() for line in lines if PUBLISHES in line]
    assert len(lines) > 10 and skipped
    assert all(words[0] == "twine" or words[:3] == ["python", "-m", "build"] for words in skipped)


def test_names_in_the_guide_are_real() -> None:
    """The table of the contract has every member of Objective; those of fields name what `types` lists."""
    from lit_palm.objectives.base import Objective
    from lit_palm.types import Experience, Output

    text = GUIDE.read_text(encoding="utf-8")
    contract = text.split("## The contract")[1].split("\n## ")[0]
    rows = "\n".join(line.split("|")[1] for line in contract.splitlines() if line.startswith("|"))
    names = set(re.findall(r"`(\w+)", rows))
    assert names == {name for name in vars(Objective) if not name.startswith("_")}
    life = text.split("## The life of an Experience")[1].split("\n## ")[0]
    first = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in life.splitlines() if line.startswith("|")]
    legend = set(re.findall(r"^    (\w+) +\[?\w", Experience.__doc__ or "", re.MULTILINE))
    fields = set().union(*first) - {"Output", "advantages"}
    assert fields <= legend | set(Output.__dataclass_fields__)
    assert set(Output.__dataclass_fields__) <= fields


def test_links_lead_somewhere() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert target[1:] in anchors if target.startswith("#") else (GUIDE.parent / target).exists(), target
    for path in re.findall(r"\btests/test_plugin[\w/]*\.py", text):
        assert (ROOT / path).exists(), path
    for package in sorted(path.parent.name for path in GUIDE.parent.glob("*/pyproject.toml")):
        assert f"]({package})" in text, f"{package} is not mentioned"


@pytest.mark.parametrize("line", ["false", "lit-palm plugins show Nobody", "cd nowhere"])
def test_a_command_that_fails_is_noticed(line: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        Reader(tmp_path, whole=True).follow(Block("bash", f"{line}\ntrue\n", 1))
