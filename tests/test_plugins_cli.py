"""Plugins at the command line: every kind of bad one named with its cause, unused ones untouched, and fifty at once.

tests/test_plugins.py has the same room from inside; here is what a user sees.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import docstring_parser
import pytest
import yaml

from lit_palm import plugins
from lit_palm.cli import main
from lit_palm.plugins import checking
from tests.support import write_jsonl
from tests.test_plugins import install, objective, run

docstrings = functools.cache(docstring_parser.parse_from_object)
Run = Callable[..., tuple[int, str, str]]

# name -> (distribution, source, cause)
BAD = {
    "BadImport": ("bad-import", "import a_library_nobody_has", "No module named 'a_library_nobody_has'"),
    "BadAttribute": ("bad-attribute", "", "has no attribute 'BadAttribute'"),
    "BadBase": ("bad-base", "class BadBase:\n    API_VERSION = 1\n", "is not a subclass of lit_palm.objectives.base"),
    "BadVersion": ("bad-version", objective("BadVersion", api=2), "API_VERSION 2 and this lit_palm has 1: upgrade lit"),
    "BadTwin": ("bad-twin-one", objective("BadTwin"), r"both bad-twin-(one|two) 0.3 .* and bad-twin-(one|two) 0.3 .*"),
    "PPO": ("bad-shadow", objective("PPO"), r"both lit_palm .* and bad-shadow 0.3 .*shadows a built-in: uninstall"),
    "BadName": ("bad-name", objective("Other") + "BadName = Other\n", "names the class Other; the names must be equal"),
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All bad ones at once, and a good one between them; once, since two classes of one name cannot be told apart."""
    folder = tmp_path_factory.mktemp("site")
    for name, (distribution, source, _) in BAD.items():
        install(folder, distribution, {name: f"@:{name}"}, source)
    install(folder, "bad-twin-two", {"BadTwin": "@:BadTwin"}, objective("BadTwin"))
    install(folder, "good-one", {"GoodOne": "@:GoodOne"}, objective("GoodOne"))
    return folder


@pytest.fixture
def site(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(installed))
    monkeypatch.delenv("LIT_PALM_PLUGINS", raising=False)
    monkeypatch.chdir(installed)
    plugins.discover.cache_clear()
    yield installed
    plugins.discover.cache_clear()


@pytest.fixture
def lit_palm(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """lit_palm("fit", ...) -> (exit status, stdout, stderr), in this process."""
    # half of a parser's making is reading docstrings from source files: once is enough
    monkeypatch.setattr(docstring_parser, "parse_from_object", docstrings)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    environment = dict(os.environ)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main(list(arguments))
        except SystemExit as stop:
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    yield call
    for name in os.environ.keys() - environment.keys():  # Lightning exports the seed
        del os.environ[name]


def test_a_listing_names_each_with_distribution_and_cause(site: Path, lit_palm: Run) -> None:
    status, out, _ = lit_palm("plugins", "--json")
    assert status == 0
    rows = json.loads(out)
    for name, (distribution, _, cause) in BAD.items():
        (row,) = [row for row in rows if row["name"] == name and row["distribution"] == distribution]
        assert row["health"] in ("broken", "refused", "duplicate") and re.search(cause, row["cause"]), row
        assert (row["kind"], row["version"]) == ("objective", "0.3")
    healthy = {row["name"]: row for row in rows if row["health"] == "healthy"}
    assert healthy["GoodOne"]["cause"] is None and healthy["GoodOne"]["distribution"] == "good-one"
    assert {row["name"] for row in rows if row["distribution"] == "lit_palm"} <= healthy.keys()
    status, table, _ = lit_palm("plugins")
    assert status == 0
    for row in rows:
        line = [row["name"], row["kind"], row["distribution"], row["version"], str(row["api"] or "-"), row["health"]]
        assert line in [text.split() for text in table.splitlines()]
    places = [table.index(f"  {distribution} ") for distribution in ("lit_palm", "bad-base", "bad-name", "good-one")]
    assert places == sorted(places)  # what lit_palm brings comes first, then by the name of the distribution


@pytest.mark.parametrize("name", BAD)
def test_asking_for_a_bad_one_says_why_and_no_more(name: str, site: Path, lit_palm: Run) -> None:
    distribution, _, cause = BAD[name]
    status, out, err = lit_palm("fit", "--model=LitPolicy", "--model.network=x", f"--model.objective={name}")
    assert status == 2 and out == ""
    error = err.splitlines()[-1]
    assert error.startswith("lit-palm: error: ") and f"{distribution} 0.3" in error and re.search(cause, error)
    assert not any(other in error for other in BAD if other != name), "others have no part in it"


def test_a_refused_class_is_named_wherever_it_stands(site: Path, lit_palm: Run) -> None:
    """In YAML and by class path the parser says something else, and empty where the name should be."""
    policy = {"class_path": "LitPolicy", "init_args": {"network": "x"}}
    policy["init_args"]["objective"] = {"class_path": "BadVersion", "init_args": {"strength": 1.0}}  # type: ignore
    (site / "run.yaml").write_text(yaml.safe_dump({"model": policy}))
    for arguments in (["--config=run.yaml"], ["--model=LitPolicy", "--model.objective.class_path=BadVersion"]):
        status, _, err = lit_palm("fit", *arguments)
        assert status == 2 and re.search("model.objective: plugin BadVersion .*bad-version 0.3.* is refused", err), err


def test_the_rest_keeps_working(site: Path, lit_palm: Run) -> None:
    status, out, err = lit_palm("fit", "--model.objective.help", "GoodOne")
    assert status == 0 and "--objective.strength STRENGTH" in out and "(type: float, default: 0.5)" in out
    assert err == ""
    status, out, _ = lit_palm("plugins", "show", "GoodOne")
    assert status == 0 and "GoodOne: objective from good-one 0.3" in out and "strength: float = 0.5" in out
    status, _, err = lit_palm("fit", "--model=LitPolicy", "--model.objective=GoodOn")
    assert status == 2 and "unknown objective 'GoodOn'; did you mean GoodOne?" in err
    assert all(f"{distribution} 0.3" in err for distribution, _, _ in BAD.values())


DOCUMENTED = """
class TinyParent(Objective):
    '''The first.

    Args:
        beta: what one nat counts, which
            takes two lines.
        mode: how it is done.
    '''
    API_VERSION = 1
    def __init__(self, beta: float = 0.1, mode: Literal["one", "two"] = "one") -> None: ...
    def weight(self, experience): ...
    def loss(self, output, experience): ...

class TinyChild(TinyParent):
    '''The second, after Someone 2020.

    Args:
        gamma: a margin.
        kwargs: those of `TinyParent`.

    Raises:
        ValueError: never.
    '''
    def __init__(self, gamma: "float | None" = None, **kwargs) -> None: ...
"""


def test_show_has_inherited_arguments_with_types_and_documentation(site: Path, lit_palm: Run) -> None:
    imports = "from typing import Literal\nfrom lit_palm.objectives.base import Objective\n"
    install(site, "tiny-child", {"TinyChild": "@:TinyChild"}, imports + DOCUMENTED)
    plugins.discover.cache_clear()
    _, out, _ = lit_palm("plugins", "show", "TinyChild")
    head, _, arguments = out.partition("Arguments:\n")
    assert "The second, after Someone 2020." in head and "ValueError: never." in head and "gamma" not in head
    assert arguments.splitlines() == [
        "  gamma: float | None = None", "      a margin.",
        "  beta: float = 0.1", "      what one nat counts, which takes two lines.",
        "  mode: Literal['one', 'two'] = 'one'", "      how it is done.",
    ]  # fmt: skip


def test_what_a_plugin_prints_does_not_spoil_the_json(site: Path, lit_palm: Run) -> None:
    install(site, "tiny-loud", {"TinyLoud": "@:TinyLoud"}, "print('hello')\n" + objective("TinyLoud"))
    plugins.discover.cache_clear()
    _, out, err = lit_palm("plugins", "--json")
    assert any(row["name"] == "TinyLoud" for row in json.loads(out)) and "hello" in err


# ---------------------------------------------------------------------------------------------------- what a run costs


def test_a_run_leaves_alone_what_it_does_not_name(
    tmp_path: Path, lit_palm: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run from YAML beside a plugin that leaves a trace when it is imported, and then fails."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    trace = "import pathlib; pathlib.Path('trace').touch()\nraise RuntimeError('I am broken')"
    install(tmp_path, "tiny-unused", {"TinyUnused": "@:TinyUnused"}, trace)
    used = install(tmp_path, "tiny-used", {"TinyUsed": "@:TinyUsed"}, objective("TinyUsed"))
    network = {"d_model": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "max_length": 32}
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    config = {
        "trainer": {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_steps": 2,
                    "enable_progress_bar": False, "enable_model_summary": False},
        "model": {"class_path": "LitPolicy", "init_args": {
            "network": {"class_path": "PaLMConfig", "init_args": network}, "objective": "TinyUsed"}},
        "data": {"class_path": "DemonstrationData", "init_args": {
            "train": data, "tokenizer": "bytes", "batch_size": 2, "cache_dir": str(tmp_path / "cache")}},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    plugins.discover.cache_clear()
    try:
        status, _, err = lit_palm("fit", "--config", "run.yaml")
        assert status == 0 and "TinyUnused" not in err, err
        assert used in sys.modules and not (tmp_path / "trace").exists()
        status, out, _ = lit_palm("plugins")
        assert status == 0 and "RuntimeError: I am broken" in out and (tmp_path / "trace").exists()
    finally:
        plugins.discover.cache_clear()


MANY = 50


def install_many(folder: Path, prefix: str, end: str = "") -> None:
    for name in (f"{prefix}{number}" for number in range(MANY)):
        install(folder, f"many-{name}", {name: f"@:{name}"}, objective(name) + end)


def test_each_distribution_is_read_a_few_times_and_imported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds depend on the machine; how often files are read and modules imported does not."""
    plugins.discover.cache_clear()
    before = len(plugins.plugin_table())
    install_many(tmp_path, "Many")
    monkeypatch.syspath_prepend(str(tmp_path))
    reads, imports = [], []
    read, load = metadata.PathDistribution.read_text, checking.importlib.import_module
    monkeypatch.setattr(
        metadata.PathDistribution, "read_text", lambda self, name: reads.append(self) or read(self, name)
    )
    monkeypatch.setattr(checking.importlib, "import_module", lambda name: imports.append(name) or load(name))
    plugins.discover.cache_clear()
    try:
        assert len(plugins.discover()) == before + MANY and imports == []
        mine = [found for found in reads if str(getattr(found, "_path", "")).startswith(str(tmp_path))]
        assert MANY <= len(mine) <= 5 * MANY  # entry points and metadata
        table = plugins.plugin_table()
        assert sum(plugin.health == "healthy" for plugin in table if plugin.name.startswith("Many")) == MANY
        assert sum(name.startswith("tiny_plugin_") for name in imports) == MANY
        reads.clear()
        plugins.plugin_table()
        assert reads == []
    finally:
        plugins.discover.cache_clear()


def test_many_broken_ones_are_cleared_away_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collection of garbage takes a tenth of a second with torch in memory: one, not fifty."""
    install_many(tmp_path, "ManyLate", "raise RuntimeError('late')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.discover.cache_clear()
    collections, collect = [], gc.collect
    monkeypatch.setattr(checking.gc, "collect", lambda: collections.append(1) or collect())
    try:
        assert sum(plugin.health == "broken" for plugin in plugins.plugin_table()) >= MANY
        assert len(collections) == 1
        from lit_palm.objectives.base import Objective

        assert not [cls for cls in Objective.__subclasses__() if cls.__name__.startswith("ManyLate")]
    finally:
        plugins.discover.cache_clear()


def test_finding_and_checking_many_costs_little_beside_importing_torch(tmp_path: Path) -> None:
    """In a process of its own, against the import that every listing pays: that takes a second, fifty of these .02."""
    install_many(tmp_path, "Many")
    result = run(
        """
        import importlib, json, time
        start = time.perf_counter()
        import lit_palm.objectives.base
        torch = time.perf_counter() - start
        from lit_palm import plugins
        def seconds(mine):
            plugins.discover.cache_clear()
            start = time.perf_counter()
            for plugin in plugins.discover():
                if plugin.distribution.startswith("many-") == mine:
                    plugins.checking.check(plugin)
            return time.perf_counter() - start
        names = [p.value.partition(":")[0] for p in plugins.discover() if p.distribution.startswith("many-")]
        for name in names:
            importlib.import_module(name)
        plugins.plugin_table()
        print(json.dumps([len(names), torch, min(seconds(True) for _ in range(3))]))
        """,
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    count, torch, beyond = json.loads(result.stdout)
    assert count == MANY and beyond < torch / 4, (torch, beyond)
