"""The conformance kit finds what it is there to find, and nothing else: sound objectives pass, planted defects do not.

The pure checks run on every defect, and exactly the named ones must fail; the checks that train run on a few.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import defects
import kit_runs
import pytest

from lit_palm.objectives import PPO, LanguageModeling, RewardRanking, RewardRegression
from lit_palm.plugins import discover
from lit_palm.testing import ObjectiveChecks, ObjectiveConformance, ObjectiveRuns
from lit_palm.testing.processes import Program
from lit_palm.testing.subject import Factory

ADAPTIVE = functools.partial(
    PPO, kl_target=0.5, kl_coef=0.1, scale_reward="running", center_reward=True, value_warmup=1, max_update_kl=0.1
)


def name_of(factory: Any) -> str:
    cls = factory.func if isinstance(factory, functools.partial) else factory
    given = factory.keywords if isinstance(factory, functools.partial) else {}
    return cls.__name__ + "".join(f"-{name}" for name in given)


failures = functools.partial(kit_runs.failures, kit=ObjectiveChecks)


# ------------------------------------------------------------------------------------------ sound ones pass


class TestPPO(ObjectiveConformance):
    """Everything, as an author writes it."""

    @pytest.fixture
    def objective(self) -> Factory:
        return ADAPTIVE


class TestSound(ObjectiveChecks):
    @pytest.fixture(
        params=[
            PPO,
            functools.partial(PPO, kl_in="loss", kl_estimator="k3", dual_clip=3.0, entropy_coef=0.1),
            RewardRanking,
            functools.partial(RewardRanking, margin=True, centering=0.1),
            RewardRegression,
            functools.partial(RewardRegression, huber=0.5),
            LanguageModeling,
            functools.partial(LanguageModeling, z_loss=1e-3),
            *defects.SOUND,
        ],
        ids=name_of,
    )
    def objective(self, request: pytest.FixtureRequest) -> Factory:
        return request.param


class TestRankings(ObjectiveChecks):
    """Rankings with ties, instead of the pairs that a grouped objective gets by default."""

    data = "rankings"

    @pytest.fixture
    def objective(self) -> Factory:
        return RewardRanking


@pytest.mark.parametrize("factory", [RewardRanking, RewardRegression, LanguageModeling, *defects.SOUND], ids=name_of)
@pytest.mark.parametrize("check", ["accumulation_takes_the_step_of_a_large_batch", "resume_is_exact"])
def test_sound_objectives_train_alike(factory: Factory, check: str, tmp_path: Path) -> None:
    try:
        getattr(ObjectiveRuns(), f"test_{check}")(factory, tmp_path)
    except pytest.skip.Exception:
        assert factory is defects.BatchMean, "only what is coupled is exempt"


# ------------------------------------------------------------------------------------------ defects do not


@pytest.mark.parametrize("defect", defects.DEFECTS, ids=name_of)
def test_a_defect_is_found(defect: Any) -> None:
    factory = functools.partial(defect, **getattr(defect, "arguments", {}))
    failed = failures(factory, data=getattr(defect, "data", None))
    assert failed.keys() == defect.checks, failed
    assert all(len(said) > 40 for said in failed.values()), "a failure says what to do"


def test_each_check_has_a_defect() -> None:
    caught = set().union(*(defect.checks for defect in defects.DEFECTS))
    elsewhere = {"test_entry_point_leads_to_it"}
    assert {name for name in dir(ObjectiveChecks) if name.startswith("test_")} == caught | elsewhere


@pytest.mark.parametrize(
    "check, defect",
    [
        ("accumulation_takes_the_step_of_a_large_batch", defects.MeanInsteadOfSum),
        ("accumulation_takes_the_step_of_a_large_batch", defects.MinibatchesNotCounted),
        ("accumulation_takes_the_step_of_a_large_batch", defects.NormalisedByMicroBatch),
        ("first_step_of_a_run_has_ratio_one", defects.RatioForgetsTemperature),
        ("first_step_of_a_run_has_ratio_one", defects.NoRatio),
        ("resume_is_exact", defects.ForgottenMoments),
        ("resume_is_exact", defects.ForgottenState),
        ("two_processes_take_the_step_of_one", defects.MeanInsteadOfSum),
        ("two_processes_take_the_step_of_one", defects.hidden),
        ("command_line_gives_it_back", functools.partial(defects.WrongType, beta=0.3)),
        ("command_line_gives_it_back", defects.hidden),
    ],
    ids=lambda p: p if isinstance(p, str) else name_of(p),
)
def test_training_finds_a_defect(check: str, defect: Factory, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        getattr(ObjectiveRuns(), f"test_{check}")(defect, tmp_path)


def test_the_ratio_may_be_renounced(tmp_path: Path) -> None:
    assert "test_first_ratio_is_one" not in failures(defects.NoRatio, ratio=None)


def test_what_the_fixture_must_return() -> None:
    with pytest.raises(AssertionError, match="which is no lit_palm"):
        ObjectiveChecks().test_loss_and_weight_are_sums(object)  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"functools.partial\(MyObjective"):
        ObjectiveChecks().test_yaml_round_trip(lambda: defects.Preference())


def test_a_field_that_the_data_lack_is_named() -> None:
    said = failures(defects.Preference, data="demonstrations")["test_loss_and_weight_are_sums"]
    assert "(group)" in said and "data = 'pairs'" in said


# ------------------------------------------------------------------------------------------ entry points

ENTRY = "test_entry_point_leads_to_it"


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a distribution on the path; what discovery found before comes back afterwards."""
    discover.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(package: str, entries: str, code: str) -> Any:
        (tmp_path / f"{package}.py").write_text(code)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "top_level.txt").write_text(package)
        (info / "entry_points.txt").write_text(f"[lit_palm.objectives]\n{entries}\n")
        discover.cache_clear()
        return __import__(package)

    yield install
    monkeypatch.undo()
    discover.cache_clear()


CODE = "from defects import Preference\nclass Mine(Preference):\n    API_VERSION = 1\nclass Other(Mine): pass\n"


@pytest.mark.parametrize(
    "entries, said",
    [
        ("Mine = found_package:Mine", ""),
        ("mine = found_package:Mine", "the entry point mine of found_package 1.0 leads to the class Mine"),
        ("Other = found_package:Other", "no entry point leads to Mine of found_package"),
        ("Mine = found_package:Missing", "no entry point leads to Mine of found_package"),
    ],
)
def test_an_installed_class_has_an_entry_point_of_its_name(
    entries: str, said: str, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = install("found_package", entries, CODE)
    monkeypatch.delitem(sys.modules, "found_package")  # another case brings another one
    monkeypatch.setitem(sys.modules, "found_package", module)
    failed = failures(module.Mine)
    assert failed.keys() == ({ENTRY} if said else set()), failed
    assert said in failed.get(ENTRY, "")
    assert ENTRY not in failures(module.Mine, installed=False) or "mine" in entries


def test_a_class_that_is_not_installed_is_skipped_and_says_so() -> None:
    with pytest.raises(pytest.skip.Exception, match="belongs to no installed distribution"):
        ObjectiveChecks().test_entry_point_leads_to_it(defects.Preference)
    with pytest.raises(AssertionError, match="no entry point leads to Preference"):
        type("Kit", (ObjectiveChecks,), {"installed": True})().test_entry_point_leads_to_it(defects.Preference)


# ------------------------------------------------------------------------------------------ as an author uses it

AUTHOR = '''
import pytest
import torch
from lit_palm import Experience, Loss, Objective, Output
from lit_palm.testing import ObjectiveChecks

class Likelihood(Objective):
    """The likelihood of completions."""
    API_VERSION = 1

    def weight(self, experience: Experience) -> torch.Tensor:
        return experience["loss_mask"].sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        return Loss(-torch.where(experience["loss_mask"], output.logps, 0).sum())

class Mean(Likelihood):
    """With a defect."""
    def loss(self, output: Output, experience: Experience) -> Loss:
        return Loss(super().loss(output, experience).total / self.weight(experience).clamp(min=1))

class TestLikelihood(ObjectiveChecks):
    @pytest.fixture
    def objective(self):
        return Likelihood

class TestMean(ObjectiveChecks):
    @pytest.fixture
    def objective(self):
        return Mean

class TestForgotten(ObjectiveChecks):
    pass
'''


def test_outside_of_this_repository(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(AUTHOR)
    arguments = ["-p", "no:cacheprovider", "-q", "--tb=line", "-rfE", "test_mine.py"]
    done = Program("pytest", arguments, tmp_path / "log", folder=tmp_path).finish()
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert [line for line in lines if "TestLikelihood" in line] == [], done.stdout
    mean = [line for line in lines if "TestMean" in line]
    assert len(mean) == 1 and "test_loss_and_weight_are_sums" in mean[0], done.stdout
    assert "define one that returns your class" in done.stdout, "a missing fixture is explained"


def test_pytest_is_asked_for_by_name(tmp_path: Path) -> None:
    code = "import sys; sys.modules['pytest'] = None; import lit_palm.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "lit_palm.testing needs pytest: pip install pytest" in done.stderr


class TestNulls(ObjectiveChecks):
    """An argument that is null where its default is not survives being written as YAML."""

    @pytest.fixture
    def objective(self) -> Factory:
        return functools.partial(PPO, value_clip=None)
