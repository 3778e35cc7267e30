"""Run by test_restoring.py as a program, on one process: shards behind a URL, and in FSDP1's layout.

    python -m tests.modules.odd_places FOLDER url|fsdp1

Each saves, resumes, and compares with a run on one device that was never stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FullyShardedDataParallel

from lit_palm.callbacks import LastCheckpoint
from lit_palm.modules import LitLanguageModel, compatibility, host
from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.modules.storage import Place
from lit_palm.modules.weights import load_network
from tests.modules.many_ranks import state_of
from tests.support import adamw, apart, config, same, text_data, trainer


class Sharded(FSDPStrategy):
    """FSDP1 on a CPU, which Lightning refuses to its own class alone."""


class Wrapped(LitLanguageModel):
    """Its network is a root of FSDP1's."""

    def configure_model(self) -> None:
        super().configure_model()
        device = torch.device("cpu")
        for role, network in self.networks.items():
            if not isinstance(network, FullyShardedDataParallel):
                self.networks[role] = FullyShardedDataParallel(network, device_id=device, use_orig_params=True)

    def configure_gradient_clipping(self, *args: Any, **options: Any) -> None:
        """FSDP1 has a way of its own."""

    def header(self) -> dict[str, Any]:
        own = self.networks
        self.networks = torch.nn.ModuleDict({k: getattr(v, "module", v) for k, v in own.items()})
        try:
            return super().header()
        finally:
            self.networks = own


def fit(folder: Path, kind: str, steps: int, place: str, path: str | None, how: str = "") -> Any:
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    module: Any = LitLanguageModel(config(), optimizer=adamw)
    if kind == "fsdp1":
        options["strategy"] = Sharded(state_dict_type="sharded")
        module = Wrapped(config(), optimizer=adamw)
    elif kind == "fsdp2":
        options["strategy"] = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    last = LastCheckpoint(place, every_n_steps=2, asynchronous=how == "asynchronous")
    run = trainer(folder, callbacks=[last], max_steps=steps, limit_val_batches=0, **options)
    run.fit(module, datamodule=text_data(folder), ckpt_path=path)
    return run


def main(folder: Path, what: str) -> None:
    whole = state_of(fit(folder, "one", 6, str(folder / "straight"), None))
    kind, place = ("fsdp2", "memory://bucket/run") if what == "url" else ("fsdp1", str(folder / "run"))
    fit(folder, kind, 4, place, None, "asynchronous")
    weights = read_checkpoint(f"{place}/last.ckpt").state_dict
    assert "networks.policy.embedding.weight" in weights
    same(load_network(f"{place}/last.ckpt").state_dict(), {k[len("networks.policy.") :]: v for k, v in weights.items()})
    names = [name for name in Place(place).names() if not name.startswith(".")]
    assert names == ["last.ckpt", "step-00000004.ckpt"], names
    # on one device from those shards, under FSDP2 from FSDP1's, and as they were written
    for number, other in enumerate(("one", kind, "fsdp2")):
        run = fit(folder, other, 6, str(folder / f"{number}"), f"{place}/last.ckpt")
        if other != "fsdp1":
            ended = state_of(run)
            assert apart(whole["weights"], ended["weights"]) < 1e-5, other
            assert apart(whole["moments"], ended["moments"]) < 1e-5, other
        else:
            ended = read_checkpoint(folder / f"{number}" / "last.ckpt").state_dict
            assert apart(whole["weights"], dict(ended)) < 1e-5, other


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[2] == "fsdp1":  # what the module knows of this wrapper is not what is looked at here
        original = compatibility.config_of
        host.check_strategy = lambda strategy: None
        host.config_of = compatibility.config_of = lambda network: original(getattr(network, "module", network))
    main(Path(sys.argv[1]), sys.argv[2])
