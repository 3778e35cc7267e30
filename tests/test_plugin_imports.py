"""The packages in plugins/ use public names of lit_palm only; so they prove that the seam is wide enough.

Every .py file of a package (its tests aside) is parsed. Public is what a module of lit_palm lists in `__all__`, reached
through names without a leading underscore. Of attributes a parser can decide two things: what is read from an imported
module or class of lit_palm, and a private name read from anything other than the package's own objects (`self`, `cls`,
its own classes and modules).
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml"))
FILES = sorted(
    file.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for file in package.rglob("*.py")
    if not {"tests", "build", ".venv"} & set(file.relative_to(package).parts)
)


def private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def module_named(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None


def public_names(name: str) -> set[str]:
    """What a module offers; a package also its public modules."""
    module = module_named(name)
    assert module is not None, f"{name} does not exist"
    return set(getattr(module, "__all__", ()))


def import_errors(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "lit_palm" and any(map(private, parts)):
                    yield f"line {node.lineno}: {alias.name} is private"
                if parts[0] == "lit_palm" and module_named(alias.name) is None:
                    yield f"line {node.lineno}: {alias.name} does not exist"
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "lit_palm":
            home = node.module or ""
            if any(map(private, home.split("."))):
                yield f"line {node.lineno}: {home} is private"
                continue
            for alias in node.names:
                is_module = not private(alias.name) and module_named(f"{home}.{alias.name}") is not None
                if alias.name == "*" or (alias.name not in public_names(home) and not is_module):
                    yield f"line {node.lineno}: {alias.name} is not in __all__ of {home}"


def imported_objects(tree: ast.AST) -> dict[str, object]:
    """Name in the file -> the module, class or function of lit_palm that it stands for."""
    found: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lit_palm":
                    found[alias.asname or "lit_palm"] = module_named(alias.name if alias.asname else "lit_palm")
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "lit_palm":
            for alias in node.names:
                thing = getattr(module_named(node.module or ""), alias.name, None)
                found[alias.asname or alias.name] = thing or module_named(f"{node.module}.{alias.name}")
    return found


def inherited_privates(tree: ast.AST, objects: dict[str, object]) -> Iterator[tuple[ast.ClassDef, set[str]]]:
    """Each class of the file with the private names of what it extends from lit_palm."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = [objects.get(base.id) for base in node.bases if isinstance(base, ast.Name)]
            yield node, {name for base in bases if isinstance(base, type) for name in dir(base) if private(name)}


def attribute_errors(tree: ast.AST) -> Iterator[str]:
    objects = imported_objects(tree)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} | {"self", "cls"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        thing = objects.get(node.value.id) if isinstance(node.value, ast.Name) else None
        if isinstance(thing, ModuleType):
            inner = module_named(f"{thing.__name__}.{node.attr}")
            if node.attr not in getattr(thing, "__all__", ()) and (inner is None or private(node.attr)):
                yield f"line {node.lineno}: {node.attr} is not in __all__ of {thing.__name__}"
        elif private(node.attr):
            is_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
            if not (isinstance(node.value, ast.Name) and node.value.id in own) and not is_super:
                yield f"line {node.lineno}: .{node.attr} is private"
    for cls, names in inherited_privates(tree, objects):
        for node in ast.walk(cls):
            if isinstance(node, ast.Attribute) and node.attr in names:
                yield f"line {node.lineno}: .{node.attr} is private to what {cls.name} extends"


def errors(source: str) -> list[str]:
    tree = ast.parse(source)
    return [*import_errors(tree), *attribute_errors(tree)]


@pytest.mark.parametrize("file", FILES)
def test_a_plugin_uses_public_names_only(file: str) -> None:
    assert errors((ROOT / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("kind", ["offline", "online"])
def test_so_does_what_new_objective_writes(kind: str) -> None:
    from lit_palm.scaffold import names_for, render

    files = render(names_for("tiny-public"), kind)  # type: ignore[arg-type]
    sources = [text for path, text in files.items() if path.endswith(".py")]  # the tests too
    assert len(sources) >= 4 and [found for text in sources for found in errors(text)] == []


def test_the_core_runs_without_any_plugin() -> None:
    """lit_palm and its tests name no module of a package in plugins/; the benchmarks may measure them."""
    modules = {path.name for package in PACKAGES for path in package.iterdir() if (path / "__init__.py").exists()}
    assert len(modules) >= len(PACKAGES)
    for path in [*(ROOT / "lit_palm").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        if "benchmarks" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not modules & {name.split(".")[0] for name in names}, path


def test_importing_a_plugin_brings_no_lightning() -> None:
    """`lit-palm plugins` imports every one of them; what they import is paid for by every listing."""
    code = (
        "import importlib, sys\n"
        "for folder, module in zip(sys.argv[1::2], sys.argv[2::2]):\n"
        "    sys.path.insert(0, folder)\n"
        "    importlib.import_module(module)\n"
        "    brought = [name for name in ('lightning', 'transformers', 'datasets') if name in sys.modules]\n"
        "    assert not brought, f'{module} brings {brought}'\n"
    )
    named = [text for package in PACKAGES for text in (str(package), package.name.replace("-", "_"))]
    done = subprocess.run([sys.executable, "-c", code, *named], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


# ------------------------------------------------------------------------------------------ the checks checked


@pytest.mark.parametrize(
    "source",
    [
        "from lit_palm.plugins import _refusal",
        "from lit_palm.cli import _one_line",
        "from lit_palm._internal import thing",
        "import lit_palm._internal",
        "from lit_palm import *",
        "from lit_palm.objectives.functional import Tensor",  # there, but not offered
        "from lit_palm import is_not_there",
        "def late():\n    from lit_palm.cli import _BESIDE",
        "import lit_palm\nlit_palm._HOMES",
        "from lit_palm import cli\ncli._one_line('x')",
        "from lit_palm.objectives import functional as f\nf.Tensor",
        "def loss(output):\n    return output._secret",
        "from lit_palm import PPO\nclass Mine(PPO):\n    def f(self):\n        self._adapt(1.0, 2)",
        "from lit_palm import PPO\nclass Mine(PPO):\n    def f(self):\n        super()._adapt(1.0, 2)",
        "from lit_palm import PPO\nPPO()._adapt(1.0, 2)",
    ],
)
def test_a_private_name_is_found(source: str) -> None:
    assert errors(source)


@pytest.mark.parametrize(
    "source",
    [
        "from lit_palm import PPO, Objective\nfrom lit_palm.objectives.functional import kl_estimate",
        "from lit_palm.objectives import functional\nfunctional.kl_estimate",
        "import lit_palm\nlit_palm.Objective.API_VERSION; lit_palm.__version__",
        "class Mine:\n    def f(self):\n        self._mine = Mine._other; super().__init__()",
        "import torch\nfrom .losses import _helper",
    ],
)
def test_a_public_name_is_not(source: str) -> None:
    assert errors(source) == []
