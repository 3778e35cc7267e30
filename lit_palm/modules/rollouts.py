"""Collecting rollouts for a policy: sample, score, annotate, gather, prepare.

The collection is gathered to the CPU and prepared there as a whole, then sliced by rank, so objectives never think of
ranks, and the world size may change between runs. What is sampled is a function of (seed, collection, row) alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_palm.models.base import Network
from lit_palm.modules.sharding import gathered
from lit_palm.modules.startup import check_first_ratio
from lit_palm.rollout.collector import annotate, assemble, merge, prompt_order
from lit_palm.rollout.loader import RolloutLoader
from lit_palm.rollout.rewards import RewardBatch, total_reward
from lit_palm.rollout.sampling import row_seeds
from lit_palm.types import Experience

if TYPE_CHECKING:
    from lit_palm.modules.policy import LitPolicy

__all__ = ["VALIDATION", "Rollouts"]

VALIDATION = -1
"""Number of the stream that validation samples from; collections count from 0."""

Prompt = dict[str, Any]
"""A prompt row: `prompt_ids` [n] long, `prompt` str, `columns` dict."""


class Rollouts:
    """Makes the collections of one policy.

    Args:
        module: the policy; its networks, engine, rewards and settings are used as they are at the time.
        prompts: what to sample from.
    """

    def __init__(self, module: LitPolicy, prompts: Sequence[Prompt]) -> None:
        self.module, self.prompts = module, prompts
        self.metrics: dict[str, float] = {}
        """Found out while collecting, to be logged with the next training step."""
        self.checked = False
        self.update_started = 0.0
        objective, config = module.objective, module.rollout
        if config.num_prompts % module.trainer.world_size:
            raise ValueError(
                f"rollout.num_prompts {config.num_prompts} must be a multiple of the {module.trainer.world_size} "
                "processes, so that all do the same number of forward passes"
            )
        dropout = getattr(module.network_config, "dropout", 0.0)
        if dropout:
            rank_zero_warn(
                f"the policy has dropout {dropout}: it is off while sampling and on while training, so ratios scatter "
                "around 1 from the first step; model.overrides={dropout: 0.0} turns it off"
            )
        self.loader = RolloutLoader(
            self.collect,
            config,
            objective.num_kept(config.num_rows),
            objective.grouped,
            module.global_rank,
            module.trainer.world_size,
        )

    @torch.no_grad()
    def collect(self, collection: int) -> Experience:
        """Sample, score, annotate and prepare one collection; the same on every rank, on the CPU."""
        module, config = self.module, self.module.rollout
        assert module.between_steps, "a collection in the middle of an optimiser step"
        started = time.perf_counter()
        copies = config.completions_per_prompt
        order = prompt_order(len(self.prompts), config.seed, collection * config.num_prompts, config.num_prompts)
        # whole prompts go to a rank, so that the completions of one share its prefill
        mine = torch.arange(module.global_rank, config.num_prompts, module.trainer.world_size)
        rows = (mine[:, None] * copies + torch.arange(copies)).flatten()
        prompts = [self.prompts[order[i]] for i in mine.tolist() for _ in range(copies)]
        training = module.networks.training
        module.networks.eval()  # no dropout while collecting and scoring
        with gathered(module.networks), module.numerics():
            experience, batch, seconds = sample(module, prompts, rows, collection, copies)
            self.metrics |= seconds
            annotate(experience, self._fields, config.batch_size, module.device)
        module.networks.train(training)
        experience = merge(self._gather(experience), module.pad_id)
        self._describe(experience)
        if not self.checked:
            self.checked = True
            self.metrics["startup/max_logratio"] = check_first_ratio(module, experience)
        del experience["engine_logps"]  # the ratio's denominator is what training itself computes
        module.samples = as_samples(batch, experience if module.trainer.world_size == 1 else None)
        experience = module.objective.prepare(experience)
        self.metrics |= experience.get("metrics", {})
        self.update_started = time.perf_counter()
        self.metrics["time/collect_s"] = self.update_started - started
        return experience

    def _fields(self, rows: Experience) -> dict[str, Tensor]:
        module, needs = self.module, self.module.objective.needs
        fields = {"old_logps": module.policy_logps(rows)}
        if "reference" in needs:
            fields["ref_logps"] = module.reference_logps(rows)
        if "value" in needs:
            fields["values"] = module.state_values(rows)
        return fields

    def _gather(self, experience: Experience) -> list[Experience]:
        world_size = self.module.trainer.world_size
        if world_size == 1:
            return [experience]
        parts: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(parts, dict(experience))
        return [Experience(p) for p in parts]

    def _describe(self, experience: Experience) -> None:
        lengths = experience["loss_mask"].sum(1).float()
        self.metrics["completions/mean_length"] = lengths.mean().item()
        self.metrics["completions/min_length"] = lengths.min().item()
        self.metrics["completions/max_length"] = lengths.max().item()
        self.metrics["completions/clipped_ratio"] = 1 - experience["ended"].float().mean().item()
        for name, values in experience.get("rewards", {}).items():
            self.metrics[f"rewards/{name}/mean"] = values.mean().item()
            self.metrics[f"rewards/{name}/std"] = values.std().item() if len(values) > 1 else 0.0

    def pop_metrics(self) -> dict[str, float]:
        """The metrics found since the last call."""
        metrics, self.metrics = self.metrics, {}
        return metrics


@torch.no_grad()
def sample(
    module: LitPolicy, prompts: Sequence[Prompt], rows: Tensor, stream: int, copies: int = 1
) -> tuple[Experience, RewardBatch, dict[str, float]]:
    """Complete prompts and score the completions.

    Args:
        module: the policy with its engine and rewards.
        prompts: one for each of `rows`.
        rows: [B] global row numbers, which with the seed and `stream` determine what is sampled.
        stream: number of the collection, or VALIDATION.
        copies: completions a prompt (numbers the prompts).

    Returns:
        The experience so far, what the rewards saw, and seconds by name.

    Raises:
        ValueError: a prompt does not fit, or a reward misbehaves.
    """
    tokenizer, policy = module.ready_tokenizer, module.networks["policy"]
    assert isinstance(policy, Network)
    ids = [p["prompt_ids"] for p in prompts]
    start = time.perf_counter()
    generation = module.engine.generate(
        policy,
        ids,
        module.sampling,
        row_seeds(module.rollout.seed, stream, rows),
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        decode=tokenizer.decode,
    )
    seconds = {"time/rollout_s": time.perf_counter() - start}
    experience = assemble(ids, generation, tokenizer.pad_id, rows, rows // copies)
    experience["engine_logps"] = torch.zeros(experience["tokens"].shape, dtype=torch.float32)
    experience["engine_logps"][experience["loss_mask"]] = torch.cat(generation.logps).float()
    names = sorted({k for p in prompts for k in p["columns"]})
    batch = RewardBatch(
        prompts=[p["prompt"] for p in prompts],
        completions=[
            completion_text(tokenizer.decode(c.tolist()), reason, module.sampling.stop)
            for c, reason in zip(generation.completions, generation.finish_reason, strict=True)
        ],
        prompt_ids=ids,
        completion_ids=generation.completions,
        ended=generation.ended,
        columns={k: [p["columns"].get(k) for p in prompts] for k in names},
        tokens=experience["tokens"],
        mask=experience["mask"],
    )
    start = time.perf_counter()
    if module.rewards:
        experience["scores"], experience["rewards"] = total_reward(module.rewards, batch)
    seconds["time/score_s"] = time.perf_counter() - start
    return experience, batch, seconds


def completion_text(text: str, reason: str, stop: Sequence[str]) -> str:
    """The text of a completion, cut before the stop text that ended it (earlier ones came too soon to count)."""
    if reason != "stop":
        return text
    return text[: max((text.rfind(s) for s in stop if s in text), default=len(text))]


def as_samples(batch: RewardBatch, experience: Experience | None, count: int = 8) -> list[dict[str, Any]]:
    """The first completions with their rewards, for people to read."""
    rewards = experience.get("rewards", {}) if experience is not None else {}
    return [
        {"prompt": p, "completion": c, "rewards": {k: v[i].item() for k, v in rewards.items()}}
        for i, (p, c) in enumerate(zip(batch.prompts[:count], batch.completions[:count], strict=True))
    ]
