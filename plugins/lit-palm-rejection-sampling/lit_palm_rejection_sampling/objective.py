"""Rejection sampling as one objective: `prepare` keeps the good completions of a round, `loss` imitates them.

A round is a collection: `rollout.num_prompts` prompts, `rollout.completions_per_prompt` completions each (the n of best
of n), `rollout.passes` epochs of fine-tuning on what was kept. `trainer.max_epochs` is the number of rounds. The number
of the round is in every checkpoint, and so is the round under way.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lit_palm import Experience, Loss, Objective, Output
from lit_palm.objectives.base import Kind, Need
from lit_palm_rejection_sampling.selection import at_least_percentile, best_of_group, first_of_equals

__all__ = ["RAFT", "RFT", "RejectionSampling"]

Keep = Literal["best", "top_k", "percentile", "threshold"]
Average = Literal["token", "row"]


class RejectionSampling(Objective):
    """Sample several completions a prompt, keep the best by any reward, fine-tune on those; round after round.

    Nakano et al. 2021 (best of n), Touvron et al. 2023 (Llama 2, section 3.2.3: rejection-sampling fine-tuning),
    Gulcehre et al. 2023 (ReST: thresholds that rise from round to round).

    Args:
        keep: `best` of each prompt; the `top_k` of each prompt; all completions of the round at or above a
            `percentile` of its scores; or all with at least the score `threshold`.
        top_k: how many of each prompt under `keep: top_k`.
        percentiles: of the first, second, ... round under `keep: percentile`; the last one holds from then on.
        threshold: least score under `keep: threshold`.
        max_per_prompt: keep no more than so many of a prompt, the best ones; null: no limit.
        distinct: count equal completions of a prompt once.
        require_end: leave out completions that did not end by themselves.
        missing_eos_penalty: subtracted from the score of a completion that did not end by itself.
        kl_coef: price of one nat away from the reference in the score of a completion; 0 needs no reference.
        average: of the negative log-likelihood: over kept tokens, or over kept rows of the mean over each row's tokens.

    Raises:
        ValueError: an argument is out of range or has no meaning for `keep`; when a run starts: `top_k` or `best` of
            fewer completions a prompt.
    """

    API_VERSION: ClassVar[int] = 1
    kind: ClassVar[Kind] = "policy"

    def __init__(
        self,
        keep: Keep = "best",
        top_k: int = 1,
        percentiles: list[float] | None = None,
        threshold: float = 0.0,
        max_per_prompt: int | None = None,
        distinct: bool = True,
        require_end: bool = False,
        missing_eos_penalty: float = 0.0,
        kl_coef: float = 0.0,
        average: Average = "token",
    ) -> None:
        for name, choice, choices in (("keep", keep, get_args(Keep)), ("average", average, get_args(Average))):
            if choice not in choices:
                raise ValueError(f"{name} is {choice!r}: choose one of {', '.join(choices)}")
        if top_k < 1 or (max_per_prompt is not None and max_per_prompt < 1):
            raise ValueError("top_k and max_per_prompt must be at least 1")
        if percentiles is not None and keep != "percentile":
            raise ValueError(f"percentiles are for keep: percentile; with keep: {keep} leave them out")
        percentiles = [50.0, 75.0, 90.0] if percentiles is None else percentiles
        if not percentiles or any(not 0 <= p <= 100 for p in percentiles):
            raise ValueError(f"percentiles must be numbers from 0 to 100, one a round, got {percentiles}")
        if keep != "top_k" and top_k != 1:
            raise ValueError(f"top_k is for keep: top_k; with keep: {keep} leave it out")
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be a finite number, got {threshold}")
        for name, price in (("kl_coef", kl_coef), ("missing_eos_penalty", missing_eos_penalty)):
            if not 0 <= price < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {price}")
        self.keep, self.top_k, self.percentiles, self.threshold = keep, top_k, percentiles, threshold
        self.max_per_prompt, self.distinct, self.require_end = max_per_prompt, distinct, require_end
        self.missing_eos_penalty, self.kl_coef, self.average = missing_eos_penalty, kl_coef, average
        self.num_rounds = 0

    @property
    def needs(self) -> frozenset[Need]:
        """Samples and scores; log-probabilities of policy and reference only for a KL penalty."""
        needs: set[Need] = {"rollouts", "reward"}
        return frozenset(needs | {"old_logps", "reference"} if self.kl_coef else needs)

    @property
    def most_of_a_prompt(self) -> int | None:
        """The most completions of a prompt that are kept; None: all."""
        limit = {"best": 1, "top_k": self.top_k}.get(self.keep)
        limits = [n for n in (limit, self.max_per_prompt) if n is not None]
        return min(limits) if limits else None

    def num_kept(self, num_prompts: int, completions: int) -> int:
        """What is kept at most; a threshold may keep anything up to everything."""
        most = self.most_of_a_prompt
        if self.keep in ("best", "top_k") and most is not None and completions <= most:
            raise ValueError(
                f"{type(self).__name__} would keep {most} of {completions} completions a prompt and select nothing: "
                "raise rollout.completions_per_prompt (8 is usual)"
            )
        return num_prompts * (completions if most is None else min(most, completions))

    # ------------------------------------------------------------------ once a round

    def prepare(self, experience: Experience) -> Experience:
        """Keep the rows to learn from; says in `metrics` what was sampled and what was kept."""
        scores = experience["scores"].float() - self.missing_eos_penalty * (~experience["ended"]).float()
        metrics: dict[str, float] = {}
        if self.kl_coef:
            apart = experience["old_logps"] - experience["ref_logps"]
            kl = torch.where(experience["loss_mask"], apart, 0).sum(1)
            scores = scores - self.kl_coef * kl
            metrics["objective/kl"] = kl.mean().item()
        kept = self._select(experience, scores)
        metrics |= self._describe(experience, scores, kept)
        experience = experience.select(kept.nonzero().squeeze(1))
        experience["metrics"] = metrics
        self.num_rounds += 1
        return experience

    def _select(self, experience: Experience, scores: Tensor) -> Tensor:
        allowed = torch.ones(len(scores), dtype=torch.bool)
        if self.distinct:
            allowed &= first_of_equals(experience)
        if self.require_end:
            allowed &= experience["ended"]
        if self.keep == "threshold":
            allowed &= scores >= self.threshold
        elif self.keep == "percentile":
            allowed = at_least_percentile(scores, self.percentile, allowed)
        most = self.most_of_a_prompt
        if most is None:
            return allowed
        return best_of_group(scores, experience["group"], experience["row"], most, allowed)

    @property
    def percentile(self) -> float:
        """Of the round to come."""
        return self.percentiles[min(self.num_rounds, len(self.percentiles) - 1)]

    def _describe(self, experience: Experience, scores: Tensor, kept: Tensor) -> dict[str, float]:
        raw, group = experience["scores"].float(), experience["group"]
        _, which, sizes = group.unique(return_inverse=True, return_counts=True)
        mean = torch.zeros(len(sizes)).index_add_(0, which, raw) / sizes
        spread = (
            torch.zeros(len(sizes)).index_add_(0, which, (raw - mean[which]).square()) / (sizes - 1).clamp(min=1)
        ).sqrt()
        metrics = {
            "reward": raw.mean().item(),
            "reward_std": spread.mean().item(),
            "frac_reward_zero_std": (spread == 0).float().mean().item(),
            "kept/share": kept.float().mean().item(),
            "kept/prompts": len(group[kept].unique()) / len(sizes),
        }
        if bool(kept.any()):
            metrics |= {"kept/reward": raw[kept].mean().item(), "kept/lowest_score": scores[kept].min().item()}
        if self.keep == "percentile":
            metrics["kept/percentile"] = self.percentile
        return metrics

    # ------------------------------------------------------------------ once a minibatch

    def weight(self, experience: Experience) -> Tensor:
        """The number of kept tokens, or rows."""
        mask: Tensor = experience["loss_mask"]
        return mask.sum() if self.average == "token" else mask.any(1).sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        """Summed negative log-likelihood of what was kept; metric `nll` a token."""
        assert output.logps is not None
        mask = experience["loss_mask"]
        per_token = -torch.where(mask, output.logps, 0)
        total = per_token.sum()
        nll = (total.detach(), mask.sum())
        if self.average == "row":
            total = (per_token.sum(1) / mask.sum(1).clamp(min=1)).sum()
        return Loss(total, {"nll": nll})

    # ------------------------------------------------------------------ across rounds

    def state_dict(self) -> dict[str, Any]:
        return {"num_rounds": self.num_rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_rounds = int(state["num_rounds"])


class RAFT(RejectionSampling):
    """Reward-ranked fine-tuning: the best completion of every prompt, a new round each time (Dong et al. 2023).

    Args:
        keep: `best`.
        kl_coef: the paper's optional KL penalty in the reward.
        kwargs: any argument of RejectionSampling.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(self, keep: Keep = "best", kl_coef: float = 0.0, **kwargs: Any) -> None:
        super().__init__(keep=keep, kl_coef=kl_coef, **kwargs)


class RFT(RejectionSampling):
    """Rejection-sampling fine-tuning: every distinct completion that is right (Yuan et al. 2023).

    "Right" is a score of at least `threshold`, as of an answer check that gives 1 or 0.

    Args:
        keep: `threshold`.
        threshold: least score of a right completion.
        max_per_prompt: keep no more than so many of a prompt; null: all.
        kwargs: any argument of RejectionSampling.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(
        self, keep: Keep = "threshold", threshold: float = 1.0, max_per_prompt: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(keep=keep, threshold=threshold, max_per_prompt=max_per_prompt, **kwargs)
