"""Training whose completions come from `lit-palm serve` over real HTTP: the same run as with the built-in engine."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm.cli import main
from lit_palm.modules.rollouts import Rollouts
from tests.modules.remote_runs import remote, start_checkpoint, trained, write_run
from tests.serve.conftest import Server
from tests.support import apart

pytest.importorskip("litserve")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_PALM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return start_checkpoint(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def serve(checkpoint: Path, weights_dir: Path) -> Iterator[Callable[[], Server]]:
    running: list[Server] = []

    def begin() -> Server:
        running.append(Server(checkpoint, "--weight_updates", str(weights_dir)))
        return running[-1]

    yield begin
    for server in running:
        server.kill()


@pytest.fixture(scope="module")
def server(serve: Callable[[], Server]) -> Server:
    return serve()


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every collection held before `prepare`, and its metrics."""
    found: list[dict[str, Any]] = []
    settle = Rollouts._settle_logps

    def record(self: Rollouts, experience: Any, *how: Any) -> Any:
        engine = experience["engine_logps"].clone()
        settled = settle(self, experience, *how)
        old, mask = settled["old_logps"], settled["loss_mask"]
        found.append({"tokens": settled["tokens"].clone(), "engine": engine, "old": old.clone(), "mask": mask,
                      "metrics": dict(self.metrics)})  # fmt: skip
        return settled

    monkeypatch.setattr(Rollouts, "_settle_logps", record)
    return found


def test_it_trains_as_with_the_built_in_engine(
    checkpoint: Path, server: Server, weights_dir: Path, sampled: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The same seeds give the same tokens, sampled from the weights as they are after every update."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    built_in = write_run(here, checkpoint, None)
    assert main(["fit", f"--config={built_in}"]) == 0
    own, sampled[:] = list(sampled), []
    assert main(["fit", f"--config={write_run(there, checkpoint, remote(server.url, weights_dir))}"]) == 0
    assert len(own) == len(sampled) == 3
    for one, other in zip(own, sampled, strict=True):
        assert torch.equal(one["tokens"], other["tokens"])
        # the server's float32 forward against the trainer's: from other weights it would be off by far more
        assert (other["engine"] - other["old"]).abs()[other["mask"]].max() < 1e-4
        assert other["metrics"]["rollout/importance_ratio_mean"] == pytest.approx(1, abs=1e-4)
        assert other["metrics"]["rollout/logp_gap"] < 1e-4
        assert other["metrics"]["rollout/importance_ratio_clipped"] == 0
    moved = (own[0]["old"] - own[2]["old"]).abs().max() if own[0]["old"].shape == own[2]["old"].shape else 1.0
    assert float(moved) > 0.1, "the weights must have moved for this to tell anything"
    # weights of 1 within rounding, which AdamW's first steps enlarge
    assert apart(trained(here), trained(there)) < 1e-2
    assert not list(weights_dir.iterdir()), "what the server has read is removed"


def test_a_server_that_dies_is_one_clear_error_and_the_run_goes_on(
    checkpoint: Path,
    server: Server,
    serve: Callable[[], Server],
    weights_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in the middle of a run; a new one at another port, with the weights it starts with, takes its place."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir(), part.mkdir()
    assert main(["fit", f"--config={write_run(whole, checkpoint, remote(server.url, weights_dir))}"]) == 0
    last = {"class_path": "lit_palm.callbacks.LastCheckpoint"}
    last["init_args"] = {"dirpath": str(part / "run"), "every_n_steps": 3}  # type: ignore[assignment]

    def config(at: Server) -> str:
        path = write_run(part, checkpoint, remote(at.url, weights_dir), trainer={"callbacks": [last]})
        return f"--config={path}"

    collect = Rollouts.collect

    def dies(self: Rollouts, collection: int) -> Any:
        if collection == 2:
            server.end(signal.SIGKILL)
        return collect(self, collection)

    with monkeypatch.context() as patch:
        patch.setattr(Rollouts, "collect", dies)
        capsys.readouterr()
        assert main(["fit", config(server)]) == 2
    said = capsys.readouterr().err
    assert server.url in said and "--ckpt_path" in said and "Traceback" not in said
    saved = part / "run" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 6, "in the middle of the second collection"
    assert main(["fit", config(serve()), f"--ckpt_path={saved}"]) == 0
    assert apart(trained(whole), trained(part)) < 1e-6
