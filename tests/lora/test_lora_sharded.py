"""PPO with LoRA on two processes: the steps of one process, and exact resumption, in the middle of a collection too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm import LoRA, load_network
from lit_palm.testing.processes import Program
from tests.lora.runs import LORA, base, fit, tokens
from tests.lora.two_ranks import STEPS
from tests.modules.strategies import saved_weights, strategy
from tests.support import apart, policy, prompt_data, trainer

ROOT = Path(__file__).parents[2]
# float32 sums in another order: 1e-7 a step, which Adam neither damps nor raises
TOLERANCE = 1e-5
WEIGHTS = 2e-4


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A language model, and a reward model that is an adapter on it."""
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_PALM_CACHE", str(folder / "cache"))
        start = base(folder)
        return start, fit(folder / "reward", "LitRewardModel", network=str(start))


def run(folder: Path, name: str, starts: tuple[Path, Path]) -> Path:
    folder = folder / name
    folder.mkdir()
    environment = {**os.environ, "LIT_PALM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    arguments = [str(folder), name, *map(str, starts)]
    ranks = 1 if name == "one" else 2
    done = Program("tests.lora.two_ranks", arguments, folder / "log", environment, ROOT, ranks).finish(400)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["sharded", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ddp", "fsdp1"))])
def test_two_processes_take_the_steps_of_one(name: str, starts: tuple[Path, Path], tmp_path: Path) -> None:
    one, two = run(tmp_path, "one", starts), run(tmp_path, name, starts)
    ours, theirs = (json.loads((folder / "losses.json").read_text()) for folder in (one, two))
    assert len(ours[0]) == STEPS and max(ours[1]) > 0.3, "clipping must be at work"
    for own, other in zip(ours, theirs, strict=True):
        assert other == pytest.approx(own, rel=TOLERANCE, abs=TOLERANCE)
    whole, resumed = (saved_weights(two / part / "last.ckpt") for part in ("whole", "resumed"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert apart(saved_weights(one / "whole" / "last.ckpt"), whole) < WEIGHTS
    assert not [name for name in whole if ".lora_" not in name and ".heads.value." not in name]
    difference = load_network(one / "whole" / "last.ckpt")(tokens()) - load_network(two / "whole" / "last.ckpt")(
        tokens()
    )
    assert difference.abs().max() < 1e-4


def test_tensor_parallelism_is_refused_by_name(starts: tuple[Path, Path], tmp_path: Path) -> None:
    class Split:
        """Stands for two processes, which it takes to make such a mesh."""

        def __getitem__(self, name: str) -> Any:
            return type("Mesh", (), {"size": lambda self: 2})()

    from lit_palm.modules import lora_stages

    made = strategy("tensor")
    made._device_mesh = Split()
    module = policy(network=str(starts[0]), lora=LoRA(**LORA))
    module.trainer = trainer(tmp_path)
    module._layout = type("Layout", (), {"strategy": made})()  # type: ignore[assignment]
    module.tokenizer = prompt_data(tmp_path).tokenizer  # type: ignore[assignment]
    from lit_palm.modules.weights import blueprint

    with pytest.raises(ValueError, match="set the strategy's tensor_parallel_size to 1"):
        lora_stages.Roles(module, blueprint(starts[0]))
