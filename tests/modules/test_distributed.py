"""One large batch, accumulated micro-batches and two processes take the same steps, with whole or shared weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_palm.modules.checkpoint import export_folder, read_checkpoint
from lit_palm.modules.weights import load_network
from lit_palm.testing.processes import Program
from tests.modules.two_processes import make
from tests.support import apart, policy, prompt_data, trainer, weights

TOKENS = torch.tensor([[258, 97, 98, 99]])
ROOT = Path(__file__).parents[2]
# Sums of float32 in another order differ by about 1e-7 a step; Adam divides by the gradient's own size, so that it
# neither grows nor shrinks. Measured: 1.4e-7 to 3.3e-6 after 6 to 12
# steps, and 3.3e-5 of its size for a bias of the value head that started at 0.
TOLERANCE = 1e-4


def learned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that the loss depends on, with the two that cancel out joined.

    A loss of differences of scores has no gradient in the head's bias: Adam walks it along with the rounding errors,
    and the calibration takes it out again.
    """
    state = dict(state)
    if "networks.reward.head.bias" in state:
        state["calibrated bias"] = state.pop("networks.reward.head.bias") - state.pop("networks.reward.offset")
    return state


def one_process(job: str, folder: Path, ways: int) -> dict[str, Any]:
    module, data = make(job, folder, ways)
    if job == "policy" and ways > 1:
        module, data = policy(rollout={"minibatch_size": 4 // ways}), prompt_data(folder)
    run = trainer(folder, gradient_clip_val=0.3, max_epochs=2, accumulate_grad_batches=ways)
    run.fit(module, datamodule=data)
    metrics = {k: float(v) for k, v in run.callback_metrics.items()}
    return {"weights": weights(module), "step": run.global_step, "metrics": metrics}


def two_processes(folder: Path, strategy: str, *jobs: str) -> Path:
    folder = folder / strategy
    folder.mkdir()
    environment = {**os.environ, "LIT_PALM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    program, arguments = "tests.modules.two_processes", [str(folder), strategy, *jobs]
    done = Program(program, arguments, folder / "log", environment, ROOT, ranks=2).finish()
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


OFFLINE_AND_SELECTED = ("selection", "selection+resumed", "moving_reference", "moving_reference+resumed",
                        "known_reference")  # fmt: skip


@pytest.fixture(scope="module")
def ddp(session_folder: Path) -> Path:
    jobs = ("language_model", "reward_model", "policy", "policy+resumed", "early_stop", *OFFLINE_AND_SELECTED)
    return two_processes(session_folder, "ddp", *jobs)


@pytest.fixture(scope="module")
def sharded(session_folder: Path) -> Path:
    jobs = ("reward_model", "policy", "policy+resumed", "moving_reference", "moving_reference+resumed")
    return two_processes(session_folder, "sharded", *jobs, "known_reference", "policy+4+bf16")


def agree(job: str, folder: Path, here: Path) -> None:
    one, two = one_process(job, here, 1), torch.load(folder / f"{job}.pt")
    assert one["step"] == two["step"] >= 4
    assert two["metrics"]["grad_norm"] == pytest.approx(one["metrics"]["grad_norm"], rel=1e-5)
    assert apart(learned(one["weights"]), learned(two["weights"])) < TOLERANCE
    # what is validated is a mean over all rows, whoever held them and however many each had
    names = {
        "language_model": ["val/loss", "val/bits_per_byte", "val/perplexity"],
        "reward_model": ["val/loss", "val/accuracy", "val/margin"],
        "early_stop": [],  # a collection that is left early has no end to validate at
        "policy": ["val/reward", "val/kl", "val/length", "val/ended", "val/rewards/lower_case"],
        "selection": ["val/reward", "val/length", "rollout/rounds", "rollout/accepted"],
        "moving_reference": ["val/loss", "val/loss/pairs", "val/loss/tokens", "val/gain", "val/accuracy"],
        "known_reference": ["val/loss", "val/gain"],
    }
    for name in names[job]:
        assert two["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("job", ["language_model", "reward_model", "policy"])
def test_accumulation_equals_one_large_batch(job: str, tmp_path: Path) -> None:
    large, small = one_process(job, tmp_path, 1), one_process(job, tmp_path, 2)
    assert large["step"] == small["step"] >= 6
    assert large["metrics"]["grad_norm"] > 0.3, "clipping must be at work"
    assert apart(learned(large["weights"]), learned(small["weights"])) < TOLERANCE


@pytest.mark.parametrize(
    "job",
    ["language_model", "reward_model", "policy", "early_stop", "selection", "moving_reference", "known_reference"],
)
def test_two_processes_equal_one(job: str, tmp_path: Path, ddp: Path) -> None:
    agree(job, ddp, tmp_path)


def test_weights_gathered_in_bfloat16_start_with_ratio_one(sharded: Path) -> None:
    found = torch.load(sharded / "policy+4+bf16.pt")["metrics"]
    assert found["startup/max_logratio"] < 1e-2 and found["startup/engine_logratio"] < 0.1


@pytest.mark.parametrize("job", ["reward_model", "policy", "moving_reference", "known_reference"])
def test_two_processes_that_share_the_weights_equal_one(job: str, tmp_path: Path, sharded: Path) -> None:
    agree(job, sharded, tmp_path)


@pytest.mark.parametrize(
    "strategy, job",
    [
        ("ddp", "policy"),
        ("sharded", "policy"),
        ("ddp", "selection"),
        ("ddp", "moving_reference"),
        ("sharded", "moving_reference"),
    ],
)
def test_two_processes_resume_in_the_middle_of_a_collection(
    strategy: str, job: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(strategy)
    straight, resumed = (torch.load(folder / f"{name}.pt") for name in (job, f"{job}+resumed"))
    assert straight["step"] == resumed["step"]
    # the order of sums is the same, so nothing differs
    assert all(torch.equal(straight["weights"][k], resumed["weights"][k]) for k in straight["weights"])


def test_a_folder_of_shards_is_a_checkpoint(sharded: Path) -> None:
    path = sharded / "policy+resumed" / "last.ckpt"
    assert len(list(path.glob("*.distcp"))) == 2, "a shard of each process"
    checkpoint = read_checkpoint(path)
    assert checkpoint.header["kind"] == "policy" and checkpoint.tokenizer is not None
    policy_network, value = load_network(path), load_network(path, "value")
    logits, values = policy_network(TOKENS), value(TOKENS)
    assert logits.shape == (1, 4, 263) and values.shape == (1, 4)
    export_folder(path, sharded / "exported")
    assert torch.equal(load_network(sharded / "exported")(TOKENS), logits)
