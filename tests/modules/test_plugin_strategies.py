"""Every objective of the packages trains under sharding as it does in one process; without the packages it is skipped.

The short form takes one objective of each package, `pytest -m slow` all of them, under FSDP2 and FSDP1.
"""

from __future__ import annotations

import math
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.modules.strategies import saved_weights
from tests.modules.test_strategies import ROOT, processes
from tests.modules.two_processes import train
from tests.support import apart

OBJECTIVES = [
    entry.replace(":", ".")
    for path in sorted(ROOT.glob("plugins/*/pyproject.toml"))
    for entry in tomllib.loads(path.read_text())["project"]["entry-points"]["lit_palm.objectives"].values()
]
OBJECTIVES = [name for name in OBJECTIVES if name != "lit_palm_ilql.ILQL"]
"""Its package tests the one that comes with a network of its own."""
SHORT = ("lit_palm_dpo.DPO", "lit_palm_grpo.GRPO", "lit_palm_rejection_sampling.RejectionSampling")
WEIGHTS = 2e-4  # Adam's step where a gradient is no more than rounding


def check(names: list[str], strategy: str, folder: Path) -> None:
    names = [name for name in names if find_spec(name.partition(".")[0])]
    if not names:
        pytest.skip("the packages of plugins/ are not installed (make install-plugins)")
    jobs = [f"{name}+3" for name in names]
    two = processes(folder, strategy, *jobs, timeout=1200)
    for job in jobs:
        _, module, one = train(job, folder / "one")
        many = torch.load(two / f"{job}.pt")
        if module.objective.coupled:  # a loss of all rows of a process: other rows, another loss
            assert len(many["losses"]) == 3 and all(math.isfinite(loss) for loss in many["losses"]), job
            continue
        assert many["losses"] == pytest.approx(one.losses, rel=1e-5, abs=1e-5), job
        ours, theirs = saved_weights(folder / "one" / job / "last.ckpt"), saved_weights(two / job / "last.ckpt")
        assert apart(ours, theirs) < WEIGHTS, job


def test_an_objective_of_each_package_under_sharding(tmp_path: Path) -> None:
    check(list(SHORT), "sharded", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["sharded", "fsdp1"])
def test_every_objective_under_sharding(strategy: str, tmp_path: Path) -> None:
    assert set(SHORT) <= set(OBJECTIVES)
    check(OBJECTIVES, strategy, tmp_path)
