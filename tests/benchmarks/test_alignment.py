"""The comparison with TRL runs, in its short form; what it measures is read by people, never gated on."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from tests.benchmarks.jobs.alignment import jobs
from tests.benchmarks.measuring import Crew, measure


@pytest.mark.parametrize("name", ["dpo-float32", "dpo-precomputed", "grpo-float32"])
def test_the_short_form_measures_both_sides(name: str, crew: Crew) -> None:
    [job] = [job for job in jobs("short") if job.name == name]
    result = measure(job, crew)
    assert not result.failed and not result.left_out
    assert all(len(result.costs[side]) == job.repeats and min(result.costs[side]) > 0 for side in ("ours", "TRL"))


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    """This environment on both sides."""
    for package in ("trl", "lit_palm_dpo", "lit_palm_grpo"):
        pytest.importorskip(package)
    python = {"ours": sys.executable, "peers": sys.executable}
    found = Crew(python, 1, tmp_path_factory.mktemp("scratch"))
    yield found
    found.close()
