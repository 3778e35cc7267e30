"""Run by test_remote_processes.py as a program: PPO on two processes with completions from here and from a server.

    python -m tests.modules.remote_processes OUTPUT_FOLDER STRATEGY SERVER_URL WEIGHTS_FOLDER

Each job leaves OUTPUT_FOLDER/JOB.pt with the weights that it ended with and the last metrics.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from lit_palm.callbacks import LastCheckpoint
from lit_palm.rollout.remote import RemoteEngine
from lit_palm.rollout.sampling import Sampling
from tests.modules.strategies import PROCESSES, strategy
from tests.support import policy, prompt_data, trainer, weights

STEPS = 12
"""Three collections."""


def make(ahead: bool, engine: Any = None) -> Any:
    """A policy that learns from tokens alone: whoever sampled them, equal tokens make equal steps."""
    options = {} if engine is None else {"engine": engine}
    rollout = {"asynchronous": ahead, "old_logps": "auto" if ahead else "trainer"}
    return policy({"importance_cap": None}, rollout, sampling=Sampling(max_new_tokens=8), **options)


def main(folder: Path, name: str, url: str, weights_dir: str) -> None:
    def run(job: str, module: Any, **changes: Any) -> None:
        made = trainer(folder, **{"strategy": strategy(name), "devices": PROCESSES[name], "max_epochs": -1,
                                  "max_steps": STEPS, "enable_checkpointing": "callbacks" in changes, **changes}
                       )  # fmt: skip
        made.fit(module, datamodule=prompt_data(folder, validation=None), ckpt_path=paths.get(job))
        state = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in weights(module).items()}
        if made.is_global_zero:
            metrics = {k: float(v) for k, v in made.callback_metrics.items()}
            torch.save({"weights": state, "metrics": metrics}, folder / f"{job}.pt")

    def remote(at: str = url) -> RemoteEngine:
        return RemoteEngine(f"{at}/v1", weights_dir, retries=0, timeout=60)

    paths: dict[str, str] = {"resumed": str(folder / "part" / "last.ckpt")}
    run("here", make(False))
    run("there", make(False, remote()))
    run("ahead there", make(True, remote()))
    if name == "ddp":  # only where every process has the whole policy
        run("ahead", make(True))
        run("part", make(True), max_steps=6, callbacks=[LastCheckpoint(str(folder / "part"))])
        run("resumed", make(True))
    try:
        run("nobody", make(False, remote("http://127.0.0.1:9")))
    except RuntimeError as error:  # on every process, the ones that were to ask as well
        (folder / f"nobody.{torch.distributed.get_rank()}").write_text(str(error), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
