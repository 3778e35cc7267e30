"""The comparisons with TRL and palm-rlhf-pytorch run, in their short form; people read what they measure."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.benchmarks.jobs.alignment import jobs
from tests.benchmarks.measuring import Crew, measure


@pytest.mark.parametrize("name", ["dpo-float32", "dpo-precomputed", "grpo-float32", "ppo"])
def test_the_short_form_measures_both_sides(name: str, crew: Crew) -> None:
    [job] = [job for job in jobs("short") if job.name == name]
    result = measure(job, crew)
    assert not result.failed and not result.left_out
    assert set(result.costs) == {side.name for side in job.sides}
    assert result.differs() == ""
    assert all(len(costs) == job.repeats and min(costs) > 0 for costs in result.costs.values())


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """This environment on both sides."""
    for package in ("trl", "palm_rlhf_pytorch", "lit_palm_dpo", "lit_palm_grpo"):
        pytest.importorskip(package)
    python = {"ours": sys.executable, "peers": sys.executable}
    found = Crew(python, 1, tmp_path_factory.mktemp("scratch"))
    yield found
    found.close()
