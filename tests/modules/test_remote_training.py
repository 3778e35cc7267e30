"""Training whose completions come from `lit-palm serve` over real HTTP: the same run as with the built-in engine."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm.cli import main
from lit_palm.rollout.remote import RemoteEngine
from tests.modules.remote_runs import remote, start_checkpoint, trained, write_run
from tests.serve.conftest import Server
from tests.support import apart

pytest.importorskip("litserve")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_PALM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return start_checkpoint(tmp_path_factory.mktemp("start"))


@pytest.fixture
def serve(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    running: list[Server] = []
    (tmp_path / "weights").mkdir()

    def begin(*arguments: str, **environment: str) -> Server:
        running.append(Server(checkpoint, "--weight_updates", str(tmp_path / "weights"), *arguments, **environment))
        return running[-1]

    yield begin
    for server in running:
        server.kill()


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What every collection held before `prepare`, and its metrics."""
    from lit_palm.modules.rollouts import Rollouts

    found: list[dict[str, Any]] = []
    settle = Rollouts._settle_logps

    def record(self: Rollouts, experience: Any, fresh: bool) -> Any:
        engine = experience["engine_logps"].clone()
        settled = settle(self, experience, fresh)
        old, mask = settled["old_logps"], settled["loss_mask"]
        found.append({"tokens": settled["tokens"].clone(), "engine": engine, "old": old.clone(), "mask": mask,
                      "metrics": dict(self.metrics)})  # fmt: skip
        return settled

    monkeypatch.setattr(Rollouts, "_settle_logps", record)
    return found


def test_it_trains_as_with_the_built_in_engine(
    checkpoint: Path, serve: Callable[..., Server], sampled: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The same seeds give the same tokens, sampled from the weights as they are after every update."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    built_in = write_run(here, checkpoint, None)
    assert main(["fit", f"--config={built_in}"]) == 0
    own, sampled[:] = list(sampled), []
    server = serve()
    assert main(["fit", f"--config={write_run(there, checkpoint, remote(server.url, tmp_path / 'weights'))}"]) == 0
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
    assert not list((tmp_path / "weights").iterdir()), "what the server has read is removed"


def test_a_server_that_dies_is_one_clear_error_and_the_run_goes_on(
    checkpoint: Path, serve: Callable[..., Server], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    server = serve()
    assert main(["fit", f"--config={write_run(whole, checkpoint, remote(server.url, tmp_path / 'weights'))}"]) == 0
    part = tmp_path / "part"
    part.mkdir()
    engine = remote(server.url, tmp_path / "weights")
    short = write_run(part, checkpoint, engine, trainer={"max_epochs": 1})
    assert main(["fit", f"--config={short}"]) == 0
    server.end(signal.SIGKILL)
    path = write_run(part, checkpoint, engine)
    resume = f"--ckpt_path={part / 'run' / 'last.ckpt'}"
    capsys.readouterr()
    assert main(["fit", f"--config={path}", resume]) == 2
    said = capsys.readouterr().err
    assert server.url in said and "--ckpt_path" in said and "Traceback" not in said
    # the server comes back at another port, with the weights it was first started with
    again = serve()
    path = write_run(part, checkpoint, remote(again.url, tmp_path / "weights"))
    assert main(["fit", f"--config={path}", resume]) == 0
    assert apart(trained(whole), trained(part)) < 1e-6


def test_a_server_that_was_started_anew_is_found_out(
    checkpoint: Path, serve: Callable[..., Server], tmp_path: Path
) -> None:
    from lit_palm.modules.weights import load_network
    from lit_palm.rollout.sampling import Sampling

    network: Any = load_network(checkpoint)
    server = serve()
    engine = RemoteEngine(f"{server.url}/v1", weights_dir=str(tmp_path / "weights"), retries=0)
    engine.version = "12-abc"
    arguments: Any = (network, [torch.tensor([5, 6])], Sampling(max_new_tokens=2), torch.tensor([1]))
    with pytest.raises(RuntimeError, match="come from the weights None, the trainer handed over '12-abc'"):
        engine.generate(*arguments, pad_id=0, eos_id=1)
