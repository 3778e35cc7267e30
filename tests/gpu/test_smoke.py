"""For the day a GPU is there: `pytest -m gpu`. Every module trains, saves, resumes and writes on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm.callbacks import LastCheckpoint
from lit_palm.cli import main
from lit_palm.modules.weights import load_network
from tests.support import (
    language_model,
    make_stages,
    policy,
    prompt_data,
    ranking_data,
    reward_model,
    text_data,
    trainer,
    weights,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no GPU here"),
]
STAGES = {
    "language_model": (language_model, text_data),
    "reward_model": (lambda: reward_model(calibrate="whiten"), ranking_data),
    "policy": (policy, prompt_data),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))


def fit(stage: str, folder: Path, precision: Any, path: Path | None = None, **options: Any) -> Any:
    make, data = STAGES[stage]
    module = make()
    run = trainer(folder, accelerator="gpu", precision=precision, gradient_clip_val=0.5,
                  callbacks=[LastCheckpoint(str(folder / "last"))], **options)  # fmt: skip
    run.fit(module, datamodule=data(folder), ckpt_path=path)
    return run


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_a_module_trains_and_validates(stage: str, precision: str, tmp_path: Path) -> None:
    run = fit(stage, tmp_path, precision, max_epochs=2)
    module = run.lightning_module
    assert run.global_step >= 6 and run.strategy.root_device.type != "cpu"
    assert all(torch.isfinite(v).all() for v in weights(module).values())
    assert torch.isfinite(run.callback_metrics["grad_norm"])
    if stage == "policy":
        largest = {"32-true": 1e-4}.get(precision, 0.5)
        assert run.callback_metrics["startup/max_logratio"].item() < largest


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_module_resumes(stage: str, tmp_path: Path) -> None:
    """Sums on a GPU may come in any order, so equal to rounding; deterministic kernels make it exact."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        straight = fit(stage, tmp_path / "a", "32-true", max_steps=5)
        fit(stage, tmp_path / "b", "32-true", max_steps=3)
        resumed = fit(stage, tmp_path / "b", "32-true", tmp_path / "b" / "last" / "last.ckpt", max_steps=5)
    finally:
        torch.use_deterministic_algorithms(False)
    one, two = weights(straight.lightning_module), weights(resumed.lightning_module)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_a_gpu_loads_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit("language_model", tmp_path, "32-true", max_steps=2)
    path = tmp_path / "last" / "last.ckpt"
    assert {v.device.type for v in load_network(path).state_dict().values()} == {"cpu"}
    command = ["generate", "--checkpoint", str(path), "--prompt", "the", "--max_new_tokens", "8", "--temperature", "0"]
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("the")


def test_stages_hand_over(tmp_path: Path) -> None:
    stages = make_stages(tmp_path)
    assert all(path.exists() for path in stages.values())
