"""The walls of the design, checked on the source: who imports whom, no devices by name, files that read in one sitting.

Imports are found by parsing, also inside functions: what is imported late is imported all the same. Only
`if TYPE_CHECKING:` is passed over.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "lit_palm").rglob("*.py"))
MODULES = [path.relative_to(ROOT).as_posix() for path in SOURCES]

MAX_LINES = 350
# configuration, block and network are read together; the two modules are lists of Lightning's hooks
LONGER = {"lit_palm/models/palm.py": 440, "lit_palm/modules/host.py": 400, "lit_palm/modules/policy.py": 400}

# Arrows point from a lower number to a higher one: a room imports rooms of its own or a lower number.
LEVELS = {
    "types": 0,
    "folders": 0,
    "native": 0,
    "process": 0,
    "timing": 0,
    "version": 0,
    "optim": 0,
    "models": 1,
    "parallel": 1,
    "objectives": 1,
    "rollout": 1,
    "plugins": 2,
    "data": 2,
    "foreign": 2,
    "modules": 2,
    "callbacks": 3,
    "convert": 4,
    "generate": 4,
    "inspection": 4,
    "plan": 4,
    "scaffold": 4,
    "serve": 4,
    "testing": 4,
    "cli": 5,
    "demo": 6,
    "__init__": 6,
    "__main__": 6,
}
# Rooms of one level that stay apart; what is not listed may see its neighbours.
APART = {"models": {"objectives", "rollout"}, "objectives": {"models"}, "rollout": {"objectives"}, "data": {"modules"}}

NO_LIGHTNING = (
    "lit_palm/models/",
    "lit_palm/parallel/",
    "lit_palm/objectives/",
    "lit_palm/plugins/",
    "lit_palm/types.py",
    "lit_palm/timing.py",
    "lit_palm/optim.py",
    "lit_palm/rollout/sampling.py",
    "lit_palm/rollout/advantages.py",
    "lit_palm/rollout/engine.py",
    "lit_palm/rollout/engine_base.py",
    "lit_palm/rollout/remote.py",
    "lit_palm/rollout/remote_http.py",
    "lit_palm/rollout/remote_servers.py",
    "lit_palm/rollout/endings.py",
    "lit_palm/rollout/requests.py",
    "lit_palm/rollout/row_sampling.py",
    "lit_palm/rollout/continuous.py",
    "lit_palm/rollout/continuous_engine.py",
    "lit_palm/rollout/rewards/",
)

DEVICE_NAMES = re.compile(r"^(cuda|mps|xpu|hpu|tpu|xla|cpu)(:\d+)?$")
DEVICE_MODULES = {"cuda", "mps", "xpu", "hpu"}


def parse(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"))


def imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names of everything imported; relative imports are resolved against `package`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            # `from lit_palm import data` names the room in the alias
            yield from (f"{base}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node, package)


def room_of(name: str) -> str | None:
    """The room of a dotted name in lit_palm; None when it is the package itself or something it re-exports."""
    part = name.split(".")[1] if "." in name else "__init__"
    return part if part in LEVELS else None


def package_of(module: str) -> str:
    return module.removesuffix(".py").rpartition("/")[0].replace("/", ".")


def arrow_errors(module: str, tree: ast.AST) -> list[str]:
    room = module.split("/")[1].removesuffix(".py")
    errors = []
    for name in imports(tree, package_of(module)):
        if name.split(".")[0] != "lit_palm":
            continue
        target = room_of(name)
        if target is None:
            errors.append(f"{module}: imports {name} from the package itself; name the module that defines it")
        elif LEVELS[target] > LEVELS[room] or target in APART.get(room, ()):
            errors.append(f"{module}: {room} must not import {name}")
    return errors


def device_errors(tree: ast.AST) -> list[str]:
    """Places that name a device, such as `torch.cuda`, `.cuda()`, `torch.device("cpu")` and `.to("cuda")`.

    `map_location="cpu"` is no choice of a device: it reads a file into memory wherever the network goes then.
    """
    keywords = [node for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "map_location"]
    reading = {
        id(node.value) for node in keywords if isinstance(node.value, ast.Constant) and node.value.value == "cpu"
    }
    errors = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in DEVICE_MODULES:
            errors.append(f"line {node.lineno}: .{node.attr}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in reading:
            if DEVICE_NAMES.match(node.value):
                errors.append(f"line {node.lineno}: {node.value!r}")
    return errors


# ------------------------------------------------------------------------------------------ the checks


def test_every_room_has_a_level() -> None:
    rooms = {module.split("/")[1].removesuffix(".py") for module in MODULES}
    assert rooms <= LEVELS.keys(), "a new room: say in LEVELS where it stands"


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_one_way(module: str) -> None:
    assert arrow_errors(module, parse(module)) == []


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith(NO_LIGHTNING)])
def test_no_lightning_in_pure_rooms(module: str) -> None:
    names = {name.split(".")[0] for name in imports(parse(module), package_of(module))}
    assert not names & {"lightning", "pytorch_lightning", "lightning_fabric"}


@pytest.mark.parametrize("module", MODULES)
def test_no_device_by_name(module: str) -> None:
    assert device_errors(parse(module)) == []


@pytest.mark.parametrize("module", [module for module in MODULES if not module.rpartition("/")[2].startswith("_")])
def test_file_opens_with_a_docstring_and_reads_in_one_sitting(module: str) -> None:
    assert ast.get_docstring(parse(module)), "say what the file does, why and how to use it"
    assert len((ROOT / module).read_text(encoding="utf-8").splitlines()) <= LONGER.get(module, MAX_LINES)


def project_files() -> list[Path]:
    """What git tracks or would track; without git, what a source distribution holds."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        rooms = ("lit_palm", "configs", "plugins", "tests")
        files = [path for room in rooms for path in (ROOT / room).rglob("*")] + list(ROOT.glob("*"))
        return [path for path in files if path.is_file() and "__pycache__" not in path.parts]
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_type_checkers_see_every_public_name() -> None:
    import lit_palm

    tree = ast.parse((ROOT / "lit_palm/__init__.pyi").read_text(encoding="utf-8"))
    shown = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }
    assert shown == lit_palm._HOMES | {"__version__": "lit_palm.version"}
    for name in lit_palm.__all__:
        assert getattr(lit_palm, name) is not None


MACHINE_PATH = re.compile(r"(?<![\w./-])/(?:home|Users|root|work|mnt|scratch)/\w|\b[A-Z]:\\Users\\")


def test_no_path_of_somebodys_machine() -> None:
    found = []
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # binary
            continue
        found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


# ------------------------------------------------------------------------------------------ the checks checked


@pytest.mark.parametrize(
    "module, source",
    [
        ("lit_palm/models/x.py", "from lit_palm.objectives.base import Objective"),
        ("lit_palm/rollout/x.py", "def f():\n    from lit_palm.modules.checkpoint import load_network"),
        ("lit_palm/rollout/x.py", "from ..modules import checkpoint"),
        ("lit_palm/data/x.py", "from lit_palm import modules"),
        ("lit_palm/data/x.py", "import lit_palm.callbacks"),
        ("lit_palm/modules/x.py", "import lit_palm.cli"),
        ("lit_palm/types.py", "from lit_palm.models.base import Network"),
        ("lit_palm/modules/x.py", "from lit_palm import PaLM"),
    ],
)
def test_a_wrong_arrow_is_found(module: str, source: str) -> None:
    assert len(arrow_errors(module, ast.parse(source))) == 1


@pytest.mark.parametrize(
    "source",
    ['x.to("cuda")', "x.cuda()", 'torch.device("cpu")', 'f(device="cuda:0")', "torch.cuda.is_available()", '"mps"'],
)
def test_a_device_by_name_is_found(source: str) -> None:
    assert device_errors(ast.parse(source))
    assert not device_errors(
        ast.parse("x.to(y.device); x.cpu(); 'cpu time'; load(f, map_location='cpu'); torch.device(name)")
    )


def test_a_machine_path_is_found() -> None:
    for path in ("home/someone/data", "Users/someone", "root/x"):
        assert MACHINE_PATH.search(f"see /{path}")
        assert not MACHINE_PATH.search(f"see https://example.org/{path} and runs/{path}")
