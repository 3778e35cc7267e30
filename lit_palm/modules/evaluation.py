"""How a policy is validated, tested and asked: fixed prompts, fixed seeds, rewards and the divergence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_palm.modules.completions import generate, score
from lit_palm.modules.rollouts import VALIDATION
from lit_palm.rollout.collector import annotate
from lit_palm.types import Experience

if TYPE_CHECKING:
    from lit_palm.modules.policy import LitPolicy

__all__ = ["evaluate_prompts", "means_of_rows"]


@torch.no_grad()
def evaluate_prompts(module: LitPolicy, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Continue a batch of prompts with seeds of their own; rows of text, length, divergence and rewards."""
    if module.rollouts is not None and module.rollouts.ahead is not None and module.engine.apart:
        module.rollouts.ahead.wait()  # an engine elsewhere has one set of weights at a time
    module.handover()
    with module.uneven_passes():  # by every process, also by one that has nothing but fillers
        return _evaluate(module, batch)


def _evaluate(module: LitPolicy, batch: dict[str, Any]) -> list[dict[str, Any]]:
    real = [i for i, row in enumerate(batch["row"].tolist()) if row >= 0]  # -1 fills a batch up
    prompts = [
        {
            "prompt_ids": batch["prompt_ids"][i],
            "prompt": batch["prompts"][i],
            "columns": {k: v[i] for k, v in batch["columns"].items()},
        }
        for i in real
    ]
    rows = batch["row"][real]
    generated = generate(module, prompts, rows, VALIDATION)
    if not prompts:
        return []

    def compute(rows: Experience) -> dict[str, Tensor]:
        # an engine that was seen to agree with a forward pass saves one
        trusted = module.engine_agrees is True and not module.engine.rounds
        policy = rows["engine_logps"] if trusted else module.policy_logps(rows)
        return {"difference": policy - module.reference_logps(rows)}

    experience, scored = score(module, prompts, rows, generated)
    annotate(experience, compute, module.rollout.batch_size, module.device)
    kl = experience["difference"].sum(1)
    rewards = experience.get("rewards", {})
    return [
        {
            "prompt": scored.prompts[i],
            "completion": scored.completions[i],
            "ended": scored.ended[i],
            "num_tokens": len(scored.completion_ids[i]),
            "kl": kl[i].item(),
            "rewards": {k: v[i].item() for k, v in rewards.items()},
            "reward": experience["scores"][i].item() if module.rewards else None,
        }
        for i in range(len(prompts))
    ]


def means_of_rows(module: LitPolicy, rows: Sequence[dict[str, Any]]) -> dict[str, tuple[Tensor, Tensor]]:
    """What validation logs, as sums and counts over rows; the same names for no rows at all."""
    columns: dict[str, list[float]] = {
        "kl": [r["kl"] for r in rows],
        "length": [float(r["num_tokens"]) for r in rows],
        "ended": [float(r["ended"]) for r in rows],
    }
    if module.rewards:
        columns["reward"] = [r["reward"] for r in rows]
        for name in (name for reward in module.rewards for name in reward.logged):
            columns[f"rewards/{name}"] = [r["rewards"][name] for r in rows]
    count = torch.tensor(len(rows), device=module.device)
    sums = {k: torch.tensor(v, dtype=torch.float32, device=module.device).sum() for k, v in columns.items()}
    return {k: (total, count) for k, total in sums.items()}
