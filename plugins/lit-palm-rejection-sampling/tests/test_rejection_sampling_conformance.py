"""What lit_palm asks of every objective, and the files of this package."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from lit_palm_rejection_sampling import RAFT, RFT, RejectionSampling

from lit_palm.cli import main
from lit_palm.testing import ObjectiveChecks, ObjectiveConformance

HERE = Path(__file__).parents[1]


class TestRejectionSampling(ObjectiveConformance):
    @pytest.fixture
    def objective(self) -> Any:
        return RejectionSampling


class TestEveryOption(ObjectiveChecks):
    ratio = None  # log-probabilities are read for the KL alone

    @pytest.fixture
    def objective(self) -> Any:
        options = {"percentiles": [20.0, 60.0], "max_per_prompt": 3, "missing_eos_penalty": 0.5, "kl_coef": 0.1}
        return functools.partial(RejectionSampling, keep="percentile", average="row", **options)


class TestRAFT(ObjectiveChecks):
    @pytest.fixture
    def objective(self) -> Any:
        return RAFT


class TestRFT(ObjectiveChecks):
    @pytest.fixture
    def objective(self) -> Any:
        return functools.partial(RFT, threshold=0.0)


@pytest.mark.parametrize("source", ["configs/rejection-sampling.yaml", "README.md"])
def test_its_yaml_builds(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (HERE / source).read_text(encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        re.findall(r"```yaml\n(.*?)```", text, re.S)[0] if source == "README.md" else text, encoding="utf-8"
    )
    built: list[LightningCLI] = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: built.append(cli))
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "run.yaml", "--trainer.accelerator=cpu", "--trainer.logger=false"]) == 0
    objective = built[0].model.objective
    assert isinstance(objective, RejectionSampling)
    assert objective.percentiles == [50.0, 75.0, 90.0]
    if source != "README.md":
        shown = yaml.safe_load(text)["model"]["init_args"]["objective"]["init_args"]
        assert objective.__dict__ == RejectionSampling().__dict__ == RejectionSampling(**shown).__dict__
