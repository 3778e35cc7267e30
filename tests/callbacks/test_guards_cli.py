"""The guards through the command line: short names in YAML, the status that a script sees, one line for a mistake."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from lit_palm.cli import main
from tests.support import sentence, write_jsonl


class Kick(Callback):
    """Sends this process SIGTERM in the third step."""

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(autouse=True)
def arguments_of_this_process() -> Iterator[None]:
    argv = list(sys.argv)
    yield
    sys.argv[:] = argv


def fit(folder: Path, callbacks: str, *flags: str) -> int:
    train = write_jsonl(folder / "text.jsonl", [{"text": sentence(i)} for i in range(24)])
    (folder / "run.yaml").write_text(
        f"""
trainer:
  max_steps: 6
  accelerator: cpu
  devices: 1
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lit_palm.callbacks.LastCheckpoint
      init_args: {{dirpath: {folder}/kept}}
model:
  class_path: LitLanguageModel
  init_args:
    network:
      class_path: PaLMConfig
      init_args: {{d_model: 16, num_layers: 1, num_heads: 2, head_dim: 8, max_length: 64}}
data:
  class_path: TextData
  init_args: {{train: {train}, tokenizer: bytes, sequence_length: 24, batch_size: 4}}
"""
    )
    (folder / "more.yaml").write_text(f"trainer:\n  callbacks+:\n{callbacks}")
    return main(["fit", "--config", str(folder / "run.yaml"), "--config", str(folder / "more.yaml"), *flags])


def test_a_stopped_run_ends_with_75_and_a_finished_one_with_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guards = "    - class_path: Preemption\n    - class_path: Watchdog\n    - class_path: NonFiniteGuard\n"
    kick = f"    - class_path: {__name__}.Kick\n"
    assert fit(tmp_path, guards + kick) == 75
    assert "stopped by SIGTERM after step 3" in capsys.readouterr().err
    assert fit(tmp_path, guards, f"--ckpt_path={tmp_path}/kept/last.ckpt") == 0


@pytest.mark.parametrize(
    "callback, message",
    [
        ("{class_path: CollapseGuard, init_args: {max_kl: 10}}", "this run does not sample"),
        ("{class_path: CollapseGuard}", "CollapseGuard watches nothing"),
        ("{class_path: SpikeRewind, init_args: {dirpath: x}}", "would leave out a whole epoch"),
        ("{class_path: SpikeRewind, init_args: {dirpath: x, window: 1}}", "window is 1; it must be at least 5"),
        ("{class_path: Watchdog, init_args: {timeout: -1}}", "timeout is -1.0"),
        ("{class_path: Preemption, init_args: {signals: [SIGFOO]}}", "signals ['SIGFOO']"),
        ("{class_path: NonFiniteGuard, init_args: {max_in_a_row: 0}}", "max_in_a_row is 0"),
    ],
)
def test_a_mistake_is_one_line(callback: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = fit(tmp_path, f"    - {callback}\n")
    except SystemExit as end:
        status = int(end.code or 0)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("lit-palm: error: ")]
    assert status == 2 and len(lines) == 1 and message in lines[0], err
    assert "Traceback" not in err and not list((tmp_path / "kept").glob("*.ckpt"))
