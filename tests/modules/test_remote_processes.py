"""Several processes that sample on one server, and asynchronous rollouts on them, for whole and for shared weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm.testing.processes import Program
from tests.modules.remote_runs import start_checkpoint
from tests.modules.test_distributed import ROOT, TOLERANCE
from tests.serve.conftest import Server
from tests.support import apart

pytest.importorskip("litserve")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_PALM_CACHE", str(folder / "cache"))
        checkpoint = start_checkpoint(folder / "start")
    (folder / "weights").mkdir()
    server = Server(checkpoint, "--weight_updates", str(folder / "weights"))
    environment = {**os.environ, "LIT_PALM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    for strategy in ("ddp", "sharded"):
        (folder / strategy).mkdir()
        arguments = [str(folder / strategy), strategy, server.url, str(folder / "weights")]
        done = Program("tests.modules.remote_processes", arguments, folder / f"{strategy}.log", environment, ROOT,
                       ranks=2).finish()  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    yield folder
    server.kill()


def found(runs: Path, job: str) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(runs / f"{job}.pt")
    return loaded


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one["weights"][k], other["weights"][k]) for k in one["weights"])


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_a_server_gives_what_the_built_in_engine_gives(strategy: str, runs: Path) -> None:
    """Each process asks for its own rows, from weights that the first handed over: the same tokens, the same steps."""
    here, there = found(runs, f"{strategy}/here"), found(runs, f"{strategy}/there")
    assert equal(here, there)
    assert there["metrics"]["rollout/logp_gap"] < 1e-5


def test_asynchronous_rollouts_are_the_same_wherever_they_are_sampled(runs: Path) -> None:
    ahead, there = found(runs, "ddp/ahead"), found(runs, "ddp/ahead there")
    assert equal(ahead, there) and not equal(ahead, found(runs, "ddp/here"))
    assert ahead["metrics"]["rollout/staleness"] == there["metrics"]["rollout/staleness"] == 4
    assert apart(ahead["weights"], found(runs, "sharded/ahead there")["weights"]) < TOLERANCE


def test_two_processes_resume_to_the_last_bit(runs: Path) -> None:
    assert equal(found(runs, "ddp/ahead"), found(runs, "ddp/resumed"))


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_a_server_that_is_not_there_is_an_error_on_every_process(strategy: str, runs: Path) -> None:
    for rank in (0, 1):
        assert "http://127.0.0.1:9" in (runs / strategy / f"nobody.{rank}").read_text(encoding="utf-8")
