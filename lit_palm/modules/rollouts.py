"""Collecting rollouts for a policy: sample, score, annotate, gather, prepare.

The collection is gathered to the CPU and prepared there as a whole, then sliced by rank, so objectives never think of
ranks, and the world size may change between runs. What is sampled is a function of (seed, collection, row) alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lit_palm.models.hardware import measure_peak_bandwidth
from lit_palm.modules.completions import Prompt, as_samples, generate, score
from lit_palm.modules.overlap import Ahead, check_overlap
from lit_palm.modules.startup import check_first_ratio, choose_logps
from lit_palm.objectives.functional import importance_metrics
from lit_palm.parallel.sharded import is_sharded
from lit_palm.rollout.collector import annotate, merge, prompt_order, take
from lit_palm.rollout.engine_base import Generation
from lit_palm.rollout.loader import RolloutLoader
from lit_palm.timing import Stopwatch, span
from lit_palm.types import Experience

if TYPE_CHECKING:
    from lit_palm.modules.policy import LitPolicy

__all__ = ["VALIDATION", "Rollouts"]

VALIDATION = -1
"""Number of the stream that validation samples from; collections count from 0."""

PHASES = ("rollout", "score", "old_logps", "reference", "value", "gather", "check", "prepare")
"""What a collection's seconds go to, logged as `time/NAME_s` where it is done; together they are `time/collect_s`."""


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
        self.update_started = time.perf_counter()
        """When the last collection was there; time spent in validation moves it."""
        self._num_sampled = 0  # tokens of the collection under way, of all ranks
        self.record = False
        """Keep what is sampled in `records`, for people to read; whoever wants it says so before training."""
        self.records: tuple[int, list[dict[str, Any]]] | None = None
        """Number and rows of the last collection."""
        self._most_batches = 0.0
        self._begun = -1, 0
        """A collection that was sampled for one step, and the number of steps before it."""
        objective, config = module.objective, module.rollout
        self.ahead = Ahead(module) if config.asynchronous else None
        if config.num_prompts % module.layout.size:
            raise ValueError(
                f"rollout.num_prompts {config.num_prompts} must be a multiple of the {module.layout.size} "
                "processes, so that all complete as many prompts"
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
            objective.num_kept(config.num_prompts, config.completions_per_prompt),
            objective.grouped,
            module.layout.rank,
            module.layout.size,
        )
        self.loader.ahead = self.ahead
        if self.ahead is not None:
            check_overlap(module)

    @torch.no_grad()
    def collect(self, collection: int) -> Experience:
        """Sample, score, annotate and prepare one collection; the same on every rank, on the CPU."""
        module = self.module
        assert module.between_steps, "a collection in the middle of an optimiser step"
        with Stopwatch() as watch, span("collect"):
            experience = self._collect(collection)
        self._tell_times(watch)
        self.update_started = time.perf_counter()
        return experience

    def _collect(self, collection: int) -> Experience:
        module = self.module
        module.follow()  # what is due after the last step, or this collection would be held to an older reference
        training = module.networks.training
        module.networks.eval()  # no dropout while collecting and scoring
        if self.ahead is not None:
            self.ahead.wait()  # what is under way is of the weights before
        module.handover()
        with module.uneven_passes(), module.numerics():
            experience, rejected = self._sample_until_full(collection)
        module.networks.train(training)
        self._describe(experience)
        sampled = self._records(experience)
        with span("prepare"):
            experience = module.objective.prepare(experience)
        if rejected:  # no step is taken on what the objective refused
            experience["loss_mask"] = torch.zeros_like(experience["loss_mask"])
        if sampled is not None:
            kept = set() if rejected else set(experience["row"].tolist())
            self.records = collection, [{**row, "kept": row["row"] in kept} for row in sampled]
        if self.ahead is not None:
            self.ahead.drop(collection)
        self.metrics |= experience.get("metrics", {})
        if experience.num_rows == 0:
            rank_zero_warn(f"of collection {collection} the objective kept no completion: nothing is learned from it")
        return experience

    def _tell_times(self, watch: Stopwatch) -> None:
        """Where the seconds of a collection went, and how near sampling came to what the device can read."""
        module, rollout = self.module, watch.seconds("rollout")
        rollout = max(rollout, self.metrics.get("rollout/overlapped_s", 0.0))
        for name in ("collect", *(name for name in PHASES if watch.count(name))):
            self.metrics[f"time/{name}_s"] = watch.seconds(name)
        self.metrics["perf/rollout_tokens_per_s"] = self._num_sampled / rollout
        self._num_sampled = 0
        policy = module.networks["policy"]
        # of an engine that tells its steps, and of weights that are here as a whole
        if watch.amount("decode") and module.trainer.loggers and not is_sharded(policy):
            rate = watch.amount("decode") / (rollout - watch.seconds("prefill"))
            self.metrics["perf/rollout_bandwidth"] = rate / peak_bandwidth(module.device)

    def _sample_until_full(self, collection: int) -> tuple[Experience, bool]:
        """The accepted rows of as many rounds as it takes, `rollout.max_rounds` at most.

        Where nothing is accepted, the rows of the last round, and True.
        """
        config = self.module.rollout
        accepted: list[Experience] = []
        wanted, rounds = config.num_rows, 0
        while wanted > 0 and rounds < config.max_rounds:
            experience = self._round(collection, rounds)
            verdict = self.module.objective.accept(experience)
            if verdict is None:
                return experience, False
            rounds += 1
            accepted.append(take(experience, verdict.nonzero().squeeze(1)[:wanted]))
            wanted -= accepted[-1].num_rows
        self.metrics["rollout/rounds"] = float(rounds)
        self.metrics["rollout/accepted"] = (config.num_rows - wanted) / (rounds * config.num_rows)
        found = [part for part in accepted if part.num_rows]
        if not found:
            rank_zero_warn(
                f"all completions of collection {collection} were rejected by {type(self.module.objective).__name__}: "
                "nothing is learned from it. Raise rollout.max_rounds, or look at the rewards"
            )
            return experience, True
        return merge(found, self.module.pad_id), False

    def _round(self, collection: int, number: int) -> Experience:
        """The completions of `num_prompts` prompts, scored and annotated, of all ranks."""
        module, config = self.module, self.module.rollout
        prompts, rows = self._mine(collection, number)
        with span("rollout"):
            ids = [p["prompt_ids"] for p in prompts]
            generation = None if number else self._ahead_of(collection, rows, ids)
            fresh = generation is None
            if generation is None:
                generation = generate(module, prompts, rows, collection)
        if self.ahead is not None and not number:
            coming, rows_coming = self._mine(collection + 1, 0)
            self.ahead.start(collection + 1, rows_coming, [p["prompt_ids"] for p in coming])
        experience, batch = score(module, prompts, rows, generation, config.completions_per_prompt)
        annotate(experience, self._fields, config.batch_size, module.device)
        if self.record:
            experience["prompt"], experience["completion"] = batch.prompts, batch.completions
        with span("gather"):
            experience = merge([Experience(p) for p in module.layout.gather(dict(experience))], module.pad_id)
        self._num_sampled += int(experience["loss_mask"].sum())
        module.samples = as_samples(batch, experience if module.layout.size == 1 else None)
        return self._settle_logps(experience, fresh, number)

    def _mine(self, collection: int, number: int) -> tuple[list[Prompt], Tensor]:
        """This process's prompts of a round, one for each completion, and their global row numbers."""
        module, config = self.module, self.module.rollout
        copies = config.completions_per_prompt
        start = collection * config.num_prompts
        order = prompt_order(len(self.prompts), config.seed, start, config.num_prompts, stream=number)
        # whole prompts go to a rank, so that the completions of one share its prefill
        mine = torch.arange(module.layout.rank, config.num_prompts, module.layout.size)
        rows = ((number * config.num_prompts + mine)[:, None] * copies + torch.arange(copies)).flatten()
        return [self.prompts[order[i]] for i in mine.tolist() for _ in range(copies)], rows

    def _ahead_of(self, collection: int, rows: Tensor, ids: list[Tensor]) -> Generation | None:
        """The completions that were sampled ahead, unless there are none or they are too stale."""
        if self.ahead is None:
            return None
        taken = self.ahead.take(collection, rows, ids)
        behind = 0 if taken is None else self.module.trainer.global_step - taken.step
        limit = self.module.rollout.max_staleness
        if limit is not None and behind > limit:
            taken, behind = None, 0
        self.metrics["rollout/staleness"] = float(behind)
        if taken is None:
            return None
        self.metrics["rollout/overlapped_s"] = taken.seconds
        return taken.generation

    def _fields(self, rows: Experience) -> dict[str, Tensor]:
        module, needs = self.module, self.module.objective.needs
        fields = {}
        if not self.checked or ("old_logps" in needs and not self.trusts_engine and not self.one_step):
            with span("old_logps"):
                fields["old_logps"] = module.policy_logps(rows)
        if "reference" in needs:
            with span("reference"):
                fields["ref_logps"] = module.reference_logps(rows)
        if "value" in needs:
            with span("value"):
                fields["values"] = module.state_values(rows)
        return fields

    @property
    def one_step(self) -> bool:
        """Whether a collection is learned from in one step, whose own log-probabilities are those of who sampled."""
        module, config = self.module, self.module.rollout
        return (
            config.old_logps == "auto"
            and module.objective.old_logps_dispensable
            and not module.samples_elsewhere
            and not getattr(module.network_config, "dropout", 0.0)  # with it a pass without gradients says otherwise
            and len(self.loader) <= module.trainer.accumulate_grad_batches
        )

    def check_step(self) -> None:
        """Before every batch, refuse a second step of a collection that was sampled for one: `RuntimeError`."""
        objective, buffer, step = self.module.objective, self.loader.buffer, self.module.trainer.global_step
        if not objective.old_logps_dispensable or buffer is None or "old_logps" in buffer:
            return
        if self._begun[0] != self.loader.collection:  # perhaps in the midst of it, from a checkpoint
            self._begun = self.loader.collection, step
        elif step > self._begun[1]:
            raise RuntimeError(
                "a collection was sampled to be learned from in one step, without log-probabilities of the policy that "
                "sampled, and a second would follow: trainer.accumulate_grad_batches has become smaller since. Set "
                "model.rollout.old_logps to trainer"
            )

    @property
    def trusts_engine(self) -> bool:
        """Whether the engine's log-probabilities stand in for those of a forward pass."""
        choice = self.module.rollout.old_logps
        if choice == "auto" and (self.module.samples_elsewhere or self.module.engine.rounds):
            return False
        return choice == "engine" or (choice == "auto" and self.module.engine_agrees is True)

    def _settle_logps(self, experience: Experience, fresh: bool, number: int) -> Experience:
        """Check the first collection; then leave the log-probabilities that the objective asked for.

        Args:
            experience: annotated.
            fresh: it was sampled from the policy as it is.
            number: of the round; the first one's gap is told, which later ones do not share.
        """
        module, needs = self.module, self.module.objective.needs
        engine = experience["engine_logps"]
        if not fresh:  # of an older policy
            experience.pop("engine_logps")
        if not self.checked:
            self.checked = True
            with span("check"):
                self.metrics["startup/max_logratio"] = check_first_ratio(module, experience)
                if module.trainer.loggers:
                    peak_bandwidth(module.device)  # takes a moment, and is known from now on
            if fresh:
                self.metrics["startup/engine_logratio"] = choose_logps(module, experience)
                self.metrics["startup/trusts_engine"] = float(self.trusts_engine)
        experience.pop("engine_logps", None)
        if module.samples_elsewhere and "old_logps" in experience and not number:
            cap = module.objective.importance_cap
            self.metrics |= importance_metrics(experience["old_logps"], engine, experience["loss_mask"], cap)
        if self.trusts_engine:
            experience["old_logps"] = engine
        if "old_logps" not in needs or self.one_step:
            experience.pop("old_logps", None)
        if "rollout_logps" in needs:
            experience["rollout_logps"] = engine
        return experience

    def _records(self, experience: Experience) -> list[dict[str, Any]] | None:
        """What was sampled, for people to read, when somebody records it; the texts leave the collection."""
        if not self.record:
            return None
        texts = zip(experience.pop("prompt"), experience.pop("completion"), strict=True)
        lengths = experience["loss_mask"].sum(1).tolist()
        rewards = experience.get("rewards", {})
        return [
            {
                "row": int(experience["row"][i]),
                "group": int(experience["group"][i]),
                "prompt": prompt,
                "completion": completion,
                "ended": bool(experience["ended"][i]),
                "num_tokens": lengths[i],
                "score": experience["scores"][i].item() if "scores" in experience else None,
                "rewards": {name: values[i].item() for name, values in rewards.items()},
            }
            for i, (prompt, completion) in enumerate(texts)
        ]

    def _describe(self, experience: Experience) -> None:
        lengths = experience["loss_mask"].sum(1).float()
        self.metrics["completions/mean_length"] = lengths.mean().item()
        self.metrics["completions/min_length"] = lengths.min().item()
        self.metrics["completions/max_length"] = lengths.max().item()
        self.metrics["completions/clipped_ratio"] = 1 - experience["ended"].float().mean().item()
        for name, values in experience.get("rewards", {}).items():
            self.metrics[f"rewards/{name}/mean"] = values.mean().item()
            self.metrics[f"rewards/{name}/std"] = values.std().item() if len(values) > 1 else 0.0

    def fit_epoch(self) -> None:
        """Make Lightning's epoch as long as the collection that has just been made."""
        trainer: Any = self.module.trainer
        loop = trainer.fit_loop
        self._most_batches = self._most_batches or loop.max_batches
        loop.max_batches = min(self._most_batches, self.loader.num_batches)
        if isinstance(trainer.val_check_interval, float) and trainer.val_check_batch != float("inf"):
            trainer.val_check_batch = max(1, int(loop.max_batches * trainer.val_check_interval))

    def pop_metrics(self) -> dict[str, float]:
        """The metrics found since the last call; raises what sampling ahead has failed with."""
        if self.ahead is not None:
            self.ahead.check()
        metrics, self.metrics = self.metrics, {}
        return metrics


@cache
def peak_bandwidth(device: torch.device) -> float:
    """Bytes a second that a device reads, measured once."""
    return measure_peak_bandwidth(device)
