"""Run by test_restoring.py as a program: one step of a chain of runs, each on a number of ranks of its own.

    python -m tests.modules.many_ranks FOLDER JOB RANKS STRATEGY STEPS NAME [CHECKPOINT] [asynchronous]

The strategy is `sharded` (ModelParallelStrategy), `fsdp1` (FSDPStrategy, as far as a CPU has it) or `auto`. The run
leaves FOLDER/NAME/last.ckpt, and in FOLDER/NAME.pt what it resumed with and what it ended with: whole weights, and
whole optimiser state by the parameters' names.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lit_palm.callbacks import LastCheckpoint
from lit_palm.modules.origin import parameter_names
from tests.support import language_model, policy, prompt_data, text_data, trainer


def whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor().clone()  # on one rank it is the local tensor itself
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def state_of(run: Any) -> dict[str, Any]:
    """Whole weights and optimiser state, by name; every rank must call it."""
    module = run.lightning_module
    weights = {k: whole(v) for k, v in module.state_dict().items()}
    moments: dict[str, Any] = {}
    for optimizer, names in zip(run.optimizers, parameter_names(module, run.optimizers), strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            moments |= {f"{name}.{k}": whole(v) for k, v in optimizer.state.get(parameter, {}).items()}
    return {"weights": weights, "moments": moments, "step": run.global_step}


class AtStart(Callback):
    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.state = state_of(trainer)


def main(
    folder: Path, job: str, ranks: int, strategy: str, steps: int, name: str, path: str = "", how: str = ""
) -> None:
    if job == "language model":
        module, data = language_model(), text_data(folder, batch_size=4 // ranks)
    else:
        module, data = policy(), prompt_data(folder)
    chosen: Any = "auto" if ranks == 1 else "ddp"
    if strategy == "sharded":
        chosen = ModelParallelStrategy(data_parallel_size=ranks, tensor_parallel_size=1)
    start = AtStart()
    last = LastCheckpoint(str(folder / name), every_n_steps=1, keep_last=2, asynchronous=how == "asynchronous")
    run = trainer(folder, callbacks=[start, last], devices=ranks, strategy=chosen, max_steps=steps,
                  gradient_clip_val=0.5, limit_val_batches=0)  # fmt: skip
    run.fit(module, datamodule=data, ckpt_path=path or None)
    end = state_of(run)
    if run.is_global_zero:
        torch.save({"start": start.state, "end": end}, folder / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, what, count, kind, last_step, called, *rest = sys.argv[1:]
    main(Path(where), what, int(count), kind, int(last_step), called, *rest)
