"""Run by test_distributed.py as a program: the same trainings as there, on two processes under a strategy.

    python -m tests.modules.two_processes OUTPUT_FOLDER STRATEGY JOB...

Each job leaves OUTPUT_FOLDER/JOB.pt with the weights it ended with.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from lit_palm.callbacks import LastCheckpoint
from tests.support import language_model, policy, prompt_data, ranking_data, reward_model, text_data, trainer, weights


def make(job: str, folder: Path, ways: int) -> tuple[Any, Any]:
    """Module and data of a job whose optimiser step is `ways` micro-batches (on as many ranks, or accumulated)."""
    if job == "language_model":
        return language_model(), text_data(folder, batch_size=4 // ways)
    if job == "reward_model":
        return reward_model(calibrate="whiten"), ranking_data(folder, batch_size=4 // ways)
    return policy(), prompt_data(folder)


def main(folder: Path, strategy: Any, jobs: list[str]) -> None:
    for job in jobs:
        module, data = make(job.removesuffix("_resumed"), folder, 2)
        options = {"strategy": strategy, "devices": 2, "gradient_clip_val": 0.5, "max_epochs": 2}
        path = None
        if job.endswith("_resumed"):
            first, options["max_epochs"] = trainer(folder, callbacks=[LastCheckpoint(str(folder / job))],
                                                   **{**options, "max_epochs": None, "max_steps": 3}), 2
            first.fit(module, datamodule=data)
            module, data = make(job.removesuffix("_resumed"), folder, 2)
            path = str(folder / job / "last.ckpt")
        run = trainer(folder, **options)
        run.fit(module, datamodule=data, ckpt_path=path)
        if run.is_global_zero:
            torch.save({"weights": weights(module), "step": run.global_step,
                        "metrics": {k: float(v) for k, v in run.callback_metrics.items()}}, folder / f"{job}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
