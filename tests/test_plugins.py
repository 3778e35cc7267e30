"""Plugins against real installed distributions: a package with its .dist-info on the path, as pip would leave it.

Where it matters what is imported, the check runs in a process of its own.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
import pkgutil
import subprocess
import sys
import textwrap
import threading
import uuid
from pathlib import Path

import pytest

from lit_palm import plugins
from lit_palm.plugins import registry, scan

ROOT = Path(__file__).parents[1]
COUNTER = itertools.count()

OBJECTIVE = """
from lit_palm.objectives.base import Objective
from lit_palm.types import Loss

class {name}(Objective):
    '''Pull every log-probability up.'''
    API_VERSION = {api}
    def __init__(self, strength: float = 0.5) -> None:
        self.strength = strength
    def weight(self, experience):
        return experience["mask"].sum()
    def loss(self, output, experience) -> Loss:
        return Loss(-self.strength * output.logps.sum())
"""


def objective(name: str, api: object = 1) -> str:
    return OBJECTIVE.format(name=name, api=api)


def install(
    folder: Path, distribution: str, entries: dict[str, str], source: str = "", group: str = "lit_palm.objectives"
) -> str:
    """Install a distribution of one module into a folder; returns the module's name, which entries write as `@`."""
    module = f"tiny_plugin_{next(COUNTER)}_{uuid.uuid4().hex[:8]}"  # other files install too
    (folder / f"{module}.py").write_text(textwrap.dedent(source))
    info = folder / f"{distribution.replace('-', '_')}-0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.3\n")
    lines = "\n".join(f"{name} = {value.replace('@', module)}" for name, value in entries.items())
    (info / "entry_points.txt").write_text(f"[{group}]\n{lines}\n")
    return module


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder on the path to install into; plugins are searched anew before and after."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("LIT_PALM_PLUGINS", raising=False)
    monkeypatch.chdir(tmp_path)
    plugins.discover.cache_clear()
    yield tmp_path
    plugins.discover.cache_clear()


def found(name: str) -> list[plugins.Plugin]:
    return [plugin for plugin in plugins.plugin_table() if plugin.name == name]


def run(code: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run Python with `folder` installed, in a process of its own."""
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        check=False,
    )


# ---------------------------------------------------------------------------------------------------- built-ins


def test_builtins_are_exactly_the_concrete_classes_of_lit_palm() -> None:
    """The table of built-ins is kept by hand; what it must equal is found by walking the packages."""
    rooms = {"lit_palm.objectives": "objectives", "lit_palm.rewards": "rollout", "lit_palm.networks": "models",
             "lit_palm.engines": "rollout"}  # fmt: skip
    for group, room in rooms.items():
        module, _, base = plugins.GROUPS[group][1].partition(":")
        abstract = getattr(importlib.import_module(module), base)
        package = importlib.import_module(f"lit_palm.{room}")
        classes = {
            f"{cls.__module__}:{name}"
            for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
            for name, cls in vars(importlib.import_module(info.name)).items()
            if inspect.isclass(cls) and issubclass(cls, abstract) and not inspect.isabstract(cls)
            and cls.__module__ == info.name and not name.startswith("_")
        }  # fmt: skip
        assert classes == set(registry.BUILTINS[group].values())


def test_builtins_are_listed_as_healthy(site: Path) -> None:
    table = {(p.kind, p.name): p for p in plugins.plugin_table() if p.distribution == "lit_palm"}
    assert {("objective", "PPO"), ("reward", "RewardModel"), ("network", "PaLMConfig"), ("engine", "CachedEngine")} <= (
        table.keys()
    )
    assert all(p.health == "healthy" and p.api == 1 and p.cause is None for p in table.values())


# ---------------------------------------------------------------------------------------------------- loading


def test_load_gives_the_class_of_an_installed_distribution(site: Path) -> None:
    install(site, "tiny-lift", {"TinyLift": "@:TinyLift"}, objective("TinyLift"))
    cls = plugins.load("lit_palm.objectives", "TinyLift")
    assert cls(strength=2.0).strength == 2.0
    assert plugins.load("objective", "TinyLift") is cls
    (row,) = found("TinyLift")
    assert (row.kind, row.distribution, row.version, row.api, row.health) == (
        "objective", "tiny-lift", "0.3", 1, "healthy",
    )  # fmt: skip


def test_every_group_has_its_plugins(site: Path) -> None:
    reward = """
        from lit_palm.rollout.rewards import Reward
        class TinyReward(Reward):
            API_VERSION = 1
            def __call__(self, batch):
                return [0.0] * len(batch)
    """
    install(site, "tiny-reward", {"TinyReward": "@:TinyReward"}, reward, group="lit_palm.rewards")
    assert plugins.load("reward", "TinyReward")().name == "tiny_reward"
    with pytest.raises(plugins.PluginError, match="unknown objective 'TinyReward'"):
        plugins.load("objective", "TinyReward")
    with pytest.raises(ValueError, match="no plugin group 'optimizers'"):
        plugins.load("optimizers", "TinyReward")


def test_unknown_name_says_what_is_installed_what_is_broken_and_the_nearest(site: Path) -> None:
    install(site, "tiny-good", {"TinyGood": "@:TinyGood"}, objective("TinyGood"))
    install(site, "tiny-bad", {"TinyBad": "@:TinyBad"}, "import a_library_nobody_has")
    with pytest.raises(plugins.PluginError) as caught:
        plugins.load("objective", "tinygod")
    message = str(caught.value)
    assert "unknown objective 'tinygod'; did you mean TinyGood?" in message
    assert "TinyGood (tiny-good 0.3)" in message and "PPO (lit_palm" in message
    assert "TinyBad" in message and "tiny-bad 0.3" in message and "No module named 'a_library_nobody_has'" in message


# ---------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "another interface": (objective("TinyA", api=99), "TinyA", "API_VERSION 99 and this lit_palm has 1"),
    "no literal": (objective("TinyA").replace("API_VERSION = 1", ""), "TinyA", "states no API_VERSION"),
    "not a literal": (objective("TinyA", api="Objective.API_VERSION"), "TinyA", "literal integer"),
    "a string": (objective("TinyA", api="'1'"), "TinyA", "literal integer"),
    "another name": (objective("TinyB"), "TinyB", "names the class TinyB; the names must be equal"),
    "not a subclass": (
        "class TinyA:\n    API_VERSION = 1\n",
        "TinyA",
        "not a subclass of lit_palm.objectives.base.Obj",
    ),
    "not a class": ("def TinyA(): ...\n", "TinyA", "not a subclass"),
    "abstract": (
        "from lit_palm.objectives.base import Objective\nclass TinyA(Objective):\n    API_VERSION = 1\n",
        "TinyA",
        "does not implement loss, weight",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(site: Path, case: str) -> None:
    source, cls, cause = REFUSED[case]
    module = install(site, "tiny-refused", {"TinyA": f"@:{cls}"}, source)
    with pytest.raises(plugins.PluginError) as caught:
        plugins.load("objective", "TinyA")
    message = str(caught.value)
    assert cause in message and "TinyA" in message and "tiny-refused 0.3" in message and "refused" in message
    (row,) = found("TinyA")
    assert row.health == "refused" and cause in (row.cause or "")
    refused = getattr(sys.modules[module], cls)
    if isinstance(refused, type) and refused.__mro__[1] is not object:  # the CLI cannot make one behind our back either
        with pytest.raises(TypeError, match="refused"):
            refused()


def test_a_base_in_the_same_package_may_state_the_version(site: Path) -> None:
    install(site, "tiny-base", {"TinyC": "@:TinyC"}, objective("TinyBase") + "\nclass TinyC(TinyBase):\n    pass\n")
    assert plugins.load("objective", "TinyC").__name__ == "TinyC"


def test_check_class_guards_classes_that_came_without_an_entry_point() -> None:
    from lit_palm.objectives.base import Objective

    class Old(Objective):
        API_VERSION = 99

    with pytest.raises(plugins.PluginError, match="Old is refused: it was written for API_VERSION 99"):
        plugins.check_class("objective", Old)
    with pytest.raises(plugins.PluginError, match="cannot be used as engine"):
        plugins.check_class("engine", Old)
    plugins.check_class("objective", plugins.load("objective", "PPO"))


BROKEN = {
    "missing library": (
        "import a_library_nobody_has",
        "@:TinyD",
        "'a_library_nobody_has' (tiny_plugin_",
    ),
    "syntax": ("def (", "@:TinyD", "SyntaxError"),
    "exits": ("raise SystemExit(3)", "@:TinyD", "SystemExit: 3"),
    "no such class": ("", "@:TinyD", "has no attribute 'TinyD'"),
    "no such module": ("", "nowhere_to_be_found:TinyD", "No module named 'nowhere_to_be_found'"),
    "no class given": ("", "@", 'write it as "module:Class"'),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_is_named_with_its_cause_and_harms_nobody(
    site: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, value, cause = BROKEN[case]
    install(site, "tiny-broken", {"TinyD": value}, source)
    install(site, "tiny-fine", {"TinyE": "@:TinyE"}, objective("TinyE"))
    troubled = plugins.load_named(["fit", "--model.objective=TinyD", "--x", "TinyE"], env={})
    assert [plugin.name for plugin in troubled] == ["TinyD"]
    error = capsys.readouterr().err
    assert "TinyD" in error and "tiny-broken 0.3" in error and cause in error
    with pytest.raises(plugins.PluginError) as caught:
        plugins.load("objective", "TinyD")
    assert cause in str(caught.value) and "tiny-broken 0.3" in str(caught.value)
    assert plugins.load("objective", "TinyE").__name__ == "TinyE"


def test_damaged_metadata_is_named_and_harms_nobody(site: Path) -> None:
    install(site, "tiny-whole", {"TinyF": "@:TinyF"}, objective("TinyF"))
    install(site, "tiny-damaged", {"TinyG": "@:TinyG"})
    (site / "tiny_damaged-0.3.dist-info" / "entry_points.txt").write_text("[lit_palm.objectives]\nno equals sign\n")
    assert plugins.load("objective", "TinyF").__name__ == "TinyF"
    (row,) = [plugin for plugin in plugins.plugin_table() if plugin.distribution == "tiny-damaged"]
    assert row.health == "broken" and "entry_points.txt" in (row.cause or "")


# ---------------------------------------------------------------------------------------------------- clashes


def test_duplicate_is_an_error_naming_both(site: Path) -> None:
    first = install(site, "tiny-one", {"TinyH": "@:TinyH"}, objective("TinyH"))
    second = install(site, "tiny-two", {"TinyH": "@:TinyH"}, objective("TinyH"))
    with pytest.raises(plugins.PluginError, match=r"both .*tiny-(one|two) 0.3 .* and tiny-(one|two) 0.3"):
        plugins.load("objective", "TinyH")
    assert [plugin.health for plugin in found("TinyH")] == ["duplicate", "duplicate"]
    assert not {first, second} & sys.modules.keys()  # neither wins by being imported


def test_shadowed_builtin_is_an_error_naming_both_when_it_is_named(site: Path) -> None:
    install(site, "tiny-shadow", {"PPO": "@:PPO"}, objective("PPO"))
    wanted = "both lit_palm .* and tiny-shadow 0.3 .*shadows a built-in"
    with pytest.raises(plugins.PluginError, match=wanted):
        plugins.load("objective", "PPO")
    with pytest.raises(plugins.PluginError, match=wanted):
        plugins.load_named(["fit", "--model.objective", "PPO"], env={})
    assert plugins.load_named(["fit", "--model.objective", "RewardRanking"], env={}) == []


def test_limit_by_environment_variable(site: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    install(site, "tiny-shadow", {"PPO": "@:PPO", "TinyI": "@:TinyI"}, objective("TinyI"))
    monkeypatch.setenv("LIT_PALM_PLUGINS", "TinyI, TinyAbsent")
    assert plugins.load("objective", "TinyI").__name__ == "TinyI"
    assert plugins.load("objective", "PPO").__module__ == "lit_palm.objectives.ppo"  # the shadow is out
    plugins.load_named(["fit"], env={})
    assert "names TinyAbsent, which is not installed" in capsys.readouterr().err
    monkeypatch.setenv("LIT_PALM_PLUGINS", "")
    plugins.discover.cache_clear()
    with pytest.raises(plugins.PluginError, match="LIT_PALM_PLUGINS does not name it"):
        plugins.load("objective", "TinyI")


def test_the_same_distribution_twice_on_the_path_is_one(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editable install leaves .egg-info beside the code and .dist-info among the packages."""
    install(site, "tiny-editable", {"TinyJ": "@:TinyJ"}, objective("TinyJ"))
    again = site / "src"
    again.mkdir()
    text = (site / "tiny_editable-0.3.dist-info" / "entry_points.txt").read_text()
    (again / "Tiny_Editable.egg-info").mkdir()
    (again / "Tiny_Editable.egg-info" / "entry_points.txt").write_text(text)
    (again / "Tiny_Editable.egg-info" / "PKG-INFO").write_text(
        "Metadata-Version: 2.1\nName: Tiny_Editable\nVersion: 0\n"
    )
    monkeypatch.syspath_prepend(str(again))
    assert plugins.load("objective", "TinyJ").__name__ == "TinyJ"


# ---------------------------------------------------------------------------------------------------- names of a run


def test_only_the_plugins_a_run_names_are_imported(tmp_path: Path) -> None:
    loud = "print('imported', __name__)\n"
    named = install(tmp_path, "tiny-named", {"TinyNamed": "@:TinyNamed"}, loud + objective("TinyNamed"))
    install(tmp_path, "tiny-other", {"TinyOther": "@:TinyOther"}, loud + objective("TinyOther"))
    install(tmp_path, "tiny-crash", {"TinyCrash": "@:TinyCrash"}, loud + "raise RuntimeError('not me')")
    (tmp_path / "run.yaml").write_text("model: {objective: {class_path: TinyNamed, init_args: {strength: 0.1}}}\n")
    result = run(
        """
        from jsonargparse import ArgumentParser
        from lit_palm.objectives.base import Objective
        from lit_palm.plugins import discover, load_named
        assert len([p for p in discover() if p.distribution.startswith("tiny")]) == 3
        load_named(["fit", "--config", "run.yaml"])
        parser = ArgumentParser()
        parser.add_argument("--objective", type=Objective)
        print(parser.parse_args(["--objective=TinyNamed", "--objective.strength=2"]).objective.class_path)
        """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["imported", named, f"{named}.TinyNamed"]
    assert "TinyCrash" not in result.stderr


def test_finding_imports_nothing_of_a_plugin_nor_torch(tmp_path: Path) -> None:
    install(tmp_path, "tiny-unseen", {"TinyUnseen": "@:TinyUnseen"}, objective("TinyUnseen"))
    result = run(
        """
        import sys
        from lit_palm.plugins import discover
        before = set(sys.modules)
        names = [plugin.name for plugin in discover()]
        print("TinyUnseen" in names, [name for name in set(sys.modules) - before if name.startswith(("tiny", "torch"))])
        """,
        tmp_path,
    )
    assert result.stdout.strip() == "True []", result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["fit", "--model.objective=TinyK"],
        ["fit", "--model.objective", "TinyK"],
        ["fit", "--model.objective.help=TinyK"],
        ["fit", "--model.objective.class_path", "some.package.TinyK"],
        ["fit", "--model.rewards+=TinyK"],
        ["fit", '--model.objective={"class_path": "TinyK"}'],
        ["fit", "--model.rewards", "[{class_path: TinyK, init_args: {weight: 2}}]"],
        ["fit", "-c", "plain.yaml"],
        ["fit", "--config=plain.yaml"],
        ["fit", "--config", "base.yaml", "--config", "plain.yaml"],
        ["--config", "nested/outer.yaml", "fit"],
        ["fit", "--config", "model: {objective: TinyK}"],
        ["fit", "--config", "without_suffix"],
        ["fit", "--model.objective", "nested/objective.yaml"],
        ["fit", "--config", "not_yaml.yaml"],
    ],
)
def test_words_of_a_command_line(args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nested").mkdir()
    (tmp_path / "base.yaml").write_text("trainer: {max_steps: 3}\n")
    (tmp_path / "plain.yaml").write_text("model:\n  objective:\n    class_path: TinyK\n")
    (tmp_path / "without_suffix").write_text("model: {objective: TinyK}\n")
    (tmp_path / "not_yaml.yaml").write_text("model: {objective: TinyK\n")
    (tmp_path / "nested" / "outer.yaml").write_text("model: {objective: objective.yaml}\n")
    (tmp_path / "nested" / "objective.yaml").write_text("class_path: other.place.TinyK\n")
    assert "TinyK" in (scan.named_words(args, {}) or set())
    assert "TinyK" not in (scan.named_words(["fit", "--config", "base.yaml"], {}) or set())


def test_words_of_the_environment_and_default_files(tmp_path: Path) -> None:
    file = tmp_path / "defaults.yaml"
    file.write_text("fit: {model: {objective: TinyL}}\n")
    assert "TinyL" in (scan.named_words(["fit"], {"PL_FIT__MODEL__OBJECTIVE": "TinyL"}) or set())
    assert "TinyL" in (scan.named_words(["fit"], {"PL_FIT__CONFIG": str(file)}) or set())
    assert "TinyL" in (scan.named_words(["fit"], {}, files=[file, tmp_path / "absent.yaml"]) or set())
    assert "TinyL" in (scan.named_words(["fit"], {"MINE_OBJECTIVE": "TinyL"}, prefixes=["MINE_"]) or set())
    assert "TinyL" not in (scan.named_words(["fit"], {"EDITOR": "TinyL", "LIT_PALM_PLUGINS": "TinyL"}) or set())


def test_data_is_not_read_and_a_pipe_is_left_to_the_parser(tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    data.write_text(json.dumps(["TinyM", "x" * scan.MAX_BYTES]))
    assert "TinyM" not in (scan.named_words(["fit", "--data.train", str(data)], {}) or set())
    assert "TinyM" in (scan.named_words(["fit", "--config", str(data)], {}) or set())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("model: {objective: TinyM}"), daemon=True)
    writer.start()
    assert scan.named_words(["fit", "--config", str(pipe)], {}) is None  # any plugin may be named
    assert pipe.read_text() == "model: {objective: TinyM}"  # and nothing was taken from it
    assert scan.named_words(["fit", "--config", "s3://bucket/run.yaml"], {}) is None


# ---------------------------------------------------------------------------------------------------- the CLI's errors


def test_explain_completes_the_parsers_error(site: Path) -> None:
    from jsonargparse import ArgumentError, ArgumentParser

    from lit_palm.objectives.base import Objective

    install(site, "tiny-late", {"TinyLate": "@:TinyLate"}, objective("TinyLate", api=7))
    install(site, "tiny-gone", {"TinyGone": "@:TinyGone"}, "import a_library_nobody_has")

    def complaint(value: str) -> str:
        plugins.load_named([f"--objective={value}"], env={})
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--objective", type=Objective)
        with pytest.raises(ArgumentError) as caught:
            parser.parse_args([f"--objective={value}"])
        return plugins.explain(str(caught.value))

    assert "unknown objective 'PPOO'; did you mean PPO?" in complaint("PPOO")
    assert "unknown objective 'PythonReward': that is a kind of reward" in complaint("PythonReward")
    assert "tiny-late 0.3) is refused: it was written for API_VERSION 7" in complaint("TinyLate")
    assert "tiny-gone 0.3) is broken: ModuleNotFoundError" in complaint("TinyGone")
    assert complaint('{"class_path": "PPO", "init_args": {"no_such_argument": 1}}') == ""
    assert plugins.explain("Parser key 'trainer.max_steps': Expected a <class 'int'>. Got value: x") == ""


# ---------------------------------------------------------------------------------------------------- lit-palm plugins


def test_json_lists_everything_with_its_health(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "tiny-sick", {"TinySick": "@:TinySick"}, "import a_library_nobody_has")
    assert plugins.main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(set(row) == {"name", "kind", "distribution", "version", "api", "health", "cause"} for row in rows)
    (sick,) = [row for row in rows if row["name"] == "TinySick"]
    assert (sick["health"], sick["api"], sick["distribution"]) == ("broken", None, "tiny-sick")
    assert {row["name"] for row in rows} >= {"PPO", "PaLMConfig", "CachedEngine", "PythonReward"}


def test_table_has_a_row_each_and_causes_underneath(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "tiny-sick", {"TinySick": "@:TinySick"}, "import a_library_nobody_has")
    assert plugins.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "KIND", "DISTRIBUTION", "VERSION", "API", "HEALTH"]
    (row,) = [i for i, line in enumerate(lines) if line.startswith("TinySick")]
    assert lines[row].split() == ["TinySick", "objective", "tiny-sick", "0.3", "-", "broken"]
    assert "No module named 'a_library_nobody_has'" in lines[row + 1]


def test_show_prints_docstring_and_typed_arguments(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, "tiny-shown", {"TinyShown": "@:TinyShown"}, objective("TinyShown"))
    assert plugins.main(["show", "TinyShown"]) == 0
    text = capsys.readouterr().out
    assert "tiny-shown 0.3" in text and "Pull every log-probability up." in text and "strength: float = 0.5" in text
    plugins.main(["show", "PaLMConfig"])
    assert "num_layers: int = 8" in capsys.readouterr().out
    with pytest.raises(plugins.PluginError, match="did you mean TinyShown"):
        plugins.main(["show", "TinyShow"])
