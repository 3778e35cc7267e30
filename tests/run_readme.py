"""Runs every command of README.md that is not run by the recipes or by CI itself; the recipes must have run before.

    python -m tests.run_readme            # run them
    python -m tests.run_readme --list     # say who runs which

A command is a line of a ```bash block; `\\` at its end continues it. Nothing is skipped silently: a command that nobody
runs is an error, unless its line ends with a comment that says why it needs a cluster or a screen (`# on a cluster`).

A shell runs the first command of each verb, and all that need one or start further processes. The others are forked
from a process that has imported the framework, which spares each of them some seconds.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from lit_palm.testing.processes import Program

ROOT = Path(__file__).parents[1]


def readme_commands(text: str) -> list[str]:
    """Commands of all bash blocks, continued lines joined, comments kept."""
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                commands.append(re.sub(r"\s+", " ", line.strip()))
    return commands


def who_runs(command: str) -> str:
    """`ci`, `demo`, `elsewhere` (a cluster or a screen) or `here`."""
    from lit_palm.demo.run import addition_recipe, plugin_rows, ratings_recipe

    bare, _, comment = command.partition(" #")
    bare = bare.strip()
    if "cluster" in comment or "screen" in comment:
        return "elsewhere"
    if bare.startswith(("git clone", "cd ")):
        return "ci"
    if bare.startswith("make "):
        known = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert bare.split()[1] in known, f"README names a make target that does not exist: {bare}"
        return "ci"
    rows = sorted(plugin_rows() + plugin_rows(installed=False))
    recipes = [shlex.join(c) for recipe in (ratings_recipe(rows), addition_recipe()) for _, c in recipe]
    return "demo" if shlex.join(shlex.split(bare)) in recipes else "here"


def forkable(command: str, known: set[str]) -> list[str] | None:
    """The arguments of a plain `lit-palm` command whose verb a shell has run; `known` gains the verb otherwise."""
    words = shlex.split(command, comments=True)
    if words[0] != "lit-palm" or re.search(r"[|<>&;`$*~]|devices=", command):
        return None
    if words[1] not in known:
        known.add(words[1])
        return None
    return words[1:]


def run(command: str, known: set[str], environment: dict[str, str]) -> int:
    """Run a command; its status."""
    arguments = forkable(command, known)
    if arguments is None:
        return subprocess.run(["bash", "-euc", command], cwd=ROOT, env=environment).returncode
    with tempfile.TemporaryDirectory() as output:
        done = Program("lit_palm", arguments, Path(output), environment, ROOT).finish(1800)
    print(done.stdout, flush=True)
    print(done.stderr, file=sys.stderr, flush=True)
    return done.returncode


def main() -> int:
    commands = readme_commands((ROOT / "README.md").read_text())
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    failed, known = 0, set[str]()
    for command in commands:
        who = who_runs(command)
        print(f"[{who}] {command}", flush=True)
        if who == "here" and "--list" not in sys.argv:
            failed += run(command, known, environment) != 0
    print(f"{len(commands)} commands, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
