"""Run by test_distributed.py as a program: the same trainings as there, on two processes under a strategy.

The strategy is `ddp`, or `sharded` for ModelParallelStrategy (FSDP2).

    python -m tests.modules.two_processes OUTPUT_FOLDER STRATEGY JOB...

Each job leaves OUTPUT_FOLDER/JOB.pt with the weights it ended with. JOB+resumed is interrupted and resumed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lit_palm.callbacks import LastCheckpoint
from lit_palm.modules.reference import ReferenceUpdate
from tests.support import (
    language_model,
    policy,
    preference_policy,
    prompt_data,
    ranking_data,
    reward_model,
    selective_policy,
    text_data,
    trainer,
    weights,
)


def make(job: str, folder: Path, ways: int) -> tuple[Any, Any]:
    """Module and data of a job whose optimiser step is `ways` micro-batches (on as many ranks, or accumulated)."""
    if job == "language_model":
        return language_model(), text_data(folder, batch_size=4 // ways)
    if job == "reward_model":
        return reward_model(calibrate="whiten"), ranking_data(folder, batch_size=4 // ways)
    if job == "selection":  # a minibatch may be smaller than others, and hold nothing for one of two ranks
        return selective_policy(), prompt_data(folder)
    if job == "moving_reference":
        update = ReferenceUpdate(mix=0.3, every=2)
        return preference_policy(reference_update=update), ranking_data(folder, batch_size=4 // ways)
    if job == "known_reference":
        return preference_policy(precompute_reference=True), ranking_data(folder, batch_size=4 // ways)
    # with a bound on the divergence most of a collection's minibatches are left unused
    return policy(ppo={"max_update_kl": 2e-3} if job == "early_stop" else {}), prompt_data(folder)


def main(folder: Path, strategy: str, jobs: list[str]) -> None:
    def run(**options: Any) -> Any:
        chosen: Any = strategy
        if strategy == "sharded":
            chosen = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        return trainer(
            folder, **{"strategy": chosen, "devices": 2, "gradient_clip_val": 0.3, "max_epochs": 2, **options}
        )

    for job in jobs:
        kind, _, resumed = job.partition("+")
        path = None
        if resumed:  # after three steps, in the middle of an epoch
            module, data = make(kind, folder, 2)
            last = LastCheckpoint(str(folder / job))
            run(callbacks=[last], max_epochs=None, max_steps=3).fit(module, datamodule=data)
            path = str(folder / job / "last.ckpt")
        module, data = make(kind, folder, 2)
        second = run()
        second.fit(module, datamodule=data, ckpt_path=path)
        state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in weights(module).items()}
        if second.is_global_zero:
            metrics = {k: float(v) for k, v in second.callback_metrics.items()}
            torch.save({"weights": state, "step": second.global_step, "metrics": metrics}, folder / f"{job}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
