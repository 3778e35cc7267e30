"""No training step waits for its device, but where the host must know what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm.callbacks import NonFiniteGuard, Throughput
from lit_palm.models import palm
from lit_palm.types import Experience
from tests.modules.waits import Last, Waits
from tests.support import (
    demonstration_data,
    language_model,
    policy,
    preference_policy,
    prompt_data,
    ranking_data,
    reward_model,
    text_data,
    trainer,
)


@pytest.fixture(autouse=True)
def not_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows take the way that they take on an accelerator."""
    monkeypatch.setattr(palm, "find_documents", lambda documents: None)


def waits(module: Any, data: Any, folder: Path, **flags: Any) -> list[list[str]]:
    """Those of four steps, none of them one that logs, after a first one."""
    seen = Waits()
    callbacks = [seen, NonFiniteGuard(), Throughput(peak_flops=1e12), Last(seen)]
    options = {"max_steps": 5, "max_epochs": -1, "log_every_n_steps": 100, "gradient_clip_val": 0.5, **flags}
    trainer(folder, callbacks=callbacks, **options).fit(module, datamodule=data)
    assert len(seen.found) >= 5
    return seen.found[1:]


PASSES = {"passes": 4}  # one collection for all steps: what was found in it is logged as numbers with its first batch
JOBS: dict[str, Any] = {
    "pre-training": lambda folder: (language_model(), text_data(folder)),
    "packed": lambda folder: (language_model(), demonstration_data(folder, pack=True, max_length=64)),
    "padded": lambda folder: (language_model(), demonstration_data(folder)),
    "reward": lambda folder: (reward_model(), ranking_data(folder)),
    "preference": lambda folder: (preference_policy(), ranking_data(folder)),
    "precomputed": lambda folder: (preference_policy(precompute_reference=True), ranking_data(folder)),
    "ppo": lambda folder: (policy(rollout=PASSES), prompt_data(folder)),
}


@pytest.mark.parametrize("job", JOBS)
def test_no_step_waits(job: str, tmp_path: Path) -> None:
    assert waits(*JOBS[job](tmp_path), tmp_path) == [[]] * 4


def test_dpo_does_not_wait(tmp_path: Path) -> None:
    dpo = pytest.importorskip("lit_palm_dpo")
    assert waits(preference_policy(objective=dpo.DPO()), ranking_data(tmp_path), tmp_path) == [[]] * 4


def test_what_must_wait_does_and_is_seen(tmp_path: Path) -> None:
    """A bound on the divergence decides before each step; an optimiser that cannot leave a step out is asked."""
    found = waits(policy(ppo={"max_update_kl": 1e9}, rollout=PASSES), prompt_data(tmp_path), tmp_path)
    assert all(sorted(names) == ["__int__", "_local_scalar_dense", "tolist"] for names in found), found
    module = language_model(optimizer=lambda params: torch.optim.SGD(params, lr=1e-2))
    found = waits(module, text_data(tmp_path), tmp_path)
    assert all(0 < names.count("_local_scalar_dense") <= 3 for names in found), found


def test_a_moved_batch_gives_what_the_host_has_of_it_and_nothing_stale() -> None:
    batch = Experience(tokens=torch.ones(2, 3), mask=torch.ones(2, 3, dtype=torch.bool), group=torch.zeros(2))
    moved = batch.to(torch.device("meta"))
    assert moved["tokens"].is_meta and moved.host["tokens"] is batch["tokens"]
    moved.update(mask=torch.zeros(2, 3))
    moved |= {"group": torch.ones(2)}
    del moved["tokens"]
    moved["values"] = torch.ones(2, 3)
    assert set(moved.host) == {"mask", "group", "values"}
    assert all(moved.host[name] is moved[name] for name in moved)
