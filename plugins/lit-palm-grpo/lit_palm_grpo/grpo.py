"""The one objective of this package: a clipped policy gradient whose baseline comes from other completions.

`GRPO` has an argument for every choice in which its published relatives differ; `variants` names the combinations. Once
a collection, `prepare` turns rewards into advantages; once a minibatch, `loss` weighs them with the ratio of new to old
probability. Arguments are called as in TRL's GRPOConfig, or as in lit_palm's PPO where that has the same thing.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from lit_palm import Experience, Loss, Objective, Output
from lit_palm.objectives.base import Kind, Need
from lit_palm.objectives.functional import (
    IMPORTANCE_CAP,
    KLEstimator,
    importance_weights,
    kl_estimate,
    masked_whiten,
    rows_that_count,
)
from lit_palm_grpo.advantages import (
    NO_SPREAD,
    Baseline,
    Scale,
    group_moments,
    overlong_punishment,
    relative_rewards,
    reward_metrics,
)
from lit_palm_grpo.surrogates import (
    Aggregation,
    ImportanceLevel,
    Surrogate,
    aggregate,
    clip_shares,
    importance_ratio,
    surrogate_loss,
)

__all__ = ["GRPO", "KLPlace", "Normalization"]

KLPlace = Literal["loss", "reward", "token_reward"]
Normalization = Literal["none", "row", "token"]


class GRPO(Objective):
    """Group relative policy optimisation: the mean reward of a prompt's completions replaces the value network.

    Shao et al. 2024 (DeepSeekMath), equations 3 and 4: advantage (r - mean) / std over the completions of a prompt, a
    ratio clipped token by token, averaged over the tokens of a completion and then over completions, k3 in the loss.

    Args:
        clip_low: the ratio is clipped from below at 1 - clip_low; null: not.
        clip_high: the ratio is clipped from above at 1 + clip_high; null: not.
        dual_clip: with a negative advantage the ratio counts as this much at most, which bounds the loss (Ye et al.
            2020; TRL's `delta`); more than 1 + clip_high.
        surrogate: `clip` is PPO's pessimistic minimum, under which a clipped token has no gradient; `cispo` multiplies
            log-probabilities by the clipped ratio, itself without gradient, so that every token keeps one; `spo` (Xie
            et al. 2024) is a parabola in the ratio, best at the bound, so that what went beyond comes back.
        importance_sampling_level: the ratio of each `token`; of the `sequence`, the geometric mean over its tokens
            (GSPO, equation 7); `sequence_token`, that value with the gradient of each token (GSPO, equation 14); or of
            the whole `trajectory`, the product over its tokens (RLOO).
        aggregation: what the loss is averaged over. `row`: the tokens of a completion, then completions. `token`: all
            tokens of the optimiser step, so that long completions count for more. `constant`: completions, each the sum
            over its tokens divided by max_completion_length.
        max_completion_length: the longest completion possible, which is sampling.max_new_tokens; for `aggregation:
            constant` and for overlong_cache.
        baseline: subtracted from the reward: mean of the `group` (the completions of a prompt), of the others in it
            (`leave_one_out`), of the `batch` (the whole collection), or `none`.
        scale_rewards: the difference is divided by the standard deviation of the `group`, of the `batch`, or `none`.
        normalize_advantages: afterwards, mean 0 and deviation 1 over every `row` or every `token` of the collection.
        kl_coef: beta, the price of one nat away from the reference; 0 needs no reference.
        kl_estimator: k1, k2 or k3 of Schulman 2020; k1 only in the reward.
        kl_in: `loss` adds the estimate of each token; `reward` subtracts their sum from the completion's reward, before
            the baseline; `token_reward` charges each token with the estimates from it to the end (gamma 1).
        entropy_coef: reward for the entropy of the policy, aggregated as the loss is.
        missing_eos_penalty: subtracted from the reward of a completion that did not end by itself.
        overlong_cache: soft overlong punishment: the reward falls by up to 1 over the last so many tokens before
            max_completion_length (DAPO, equation 13); null: none.
        mask_truncated_completions: completions that did not end by themselves count for baselines, but are not learned
            from (DAPO's overlong filtering).
        dynamic_sampling: replace prompts whose completions all earn the same by new ones (DAPO, section 3.2), for up to
            rollout.max_rounds rounds.
        importance_cap: weigh tokens by min(p_old / p_rollout, importance_cap), for an engine that computes other
            probabilities than training does (2 or 3 is usual); `auto`: 2 where completions come from elsewhere (a
            remote engine, asynchronous rollouts), else none; null: trust the engine.
    """

    API_VERSION: ClassVar[int] = 1
    kind: ClassVar[Kind] = "policy"
    grouped: ClassVar[bool] = True

    def __init__(
        self,
        clip_low: float | None = 0.2,
        clip_high: float | None = 0.2,
        dual_clip: float | None = None,
        surrogate: Surrogate = "clip",
        importance_sampling_level: ImportanceLevel = "token",
        aggregation: Aggregation = "row",
        max_completion_length: int | None = None,
        baseline: Baseline = "group",
        scale_rewards: Scale = "group",
        normalize_advantages: Normalization = "none",
        kl_coef: float = 0.04,
        kl_estimator: KLEstimator = "k3",
        kl_in: KLPlace = "loss",
        entropy_coef: float = 0.0,
        missing_eos_penalty: float = 0.0,
        overlong_cache: int | None = None,
        mask_truncated_completions: bool = False,
        dynamic_sampling: bool = False,
        importance_cap: float | Literal["auto"] | None = "auto",
    ) -> None:
        self.clip_low, self.clip_high, self.dual_clip, self.surrogate = clip_low, clip_high, dual_clip, surrogate
        self.importance_sampling_level, self.aggregation = importance_sampling_level, aggregation
        self.max_completion_length, self.overlong_cache = max_completion_length, overlong_cache
        self.baseline, self.scale_rewards = baseline, scale_rewards
        self.normalize_advantages = normalize_advantages
        self.kl_coef, self.kl_estimator, self.kl_in = kl_coef, kl_estimator, kl_in
        self.entropy_coef, self.missing_eos_penalty = entropy_coef, missing_eos_penalty
        self.mask_truncated_completions, self.dynamic_sampling = mask_truncated_completions, dynamic_sampling
        self.importance_cap = None if importance_cap == "auto" else importance_cap
        self._corrects = importance_cap == "auto"
        self.bounds = (1 - (clip_low or 1.0), 1 + (clip_high or math.inf))
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        for name, choices in (
            ("surrogate", Surrogate),
            ("importance_sampling_level", ImportanceLevel),
            ("aggregation", Aggregation),
            ("baseline", Baseline),
            ("scale_rewards", Scale),
            ("normalize_advantages", Normalization),
            ("kl_estimator", KLEstimator),
            ("kl_in", KLPlace),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(get_args(choices))}")
        if self.clip_low is not None and not 0 < self.clip_low < 1:
            raise ValueError(f"clip_low must be between 0 and 1, got {self.clip_low}; null turns it off")
        for name in ("clip_high", "max_completion_length", "overlong_cache", "importance_cap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}; null turns it off")
        for name in ("kl_coef", "missing_eos_penalty"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    def _check_combinations(self) -> None:
        length, cache = self.max_completion_length, self.overlong_cache
        if length is None and (self.aggregation == "constant" or cache is not None):
            asking = "aggregation constant" if self.aggregation == "constant" else "overlong_cache"
            raise ValueError(f"{asking} needs max_completion_length: set it to sampling.max_new_tokens")
        if length is not None and cache is not None and cache > length:
            raise ValueError(f"overlong_cache {cache} is the last part of max_completion_length {length}: lower it")
        if self.dual_clip is not None:
            if self.surrogate != "clip":
                raise ValueError(f"dual_clip bounds the clipped surrogate; {self.surrogate} is bounded by clip_high")
            if not self.dual_clip > 1 + (self.clip_high or 0):
                raise ValueError(f"dual_clip {self.dual_clip} must be more than 1 + clip_high; 3 is usual, null: none")
        if self.surrogate == "spo" and (self.clip_low is None or self.clip_high is None):
            raise ValueError("surrogate spo is a parabola between both bounds: set clip_low and clip_high")
        if not self.kl_coef:
            return
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("the gradient of k1 in the loss carries no information: use kl_estimator k2 or k3")
        if self.kl_in == "token_reward" and self.importance_sampling_level in ("sequence", "trajectory"):
            raise ValueError(
                "kl_in token_reward tells the tokens of a completion apart, and one ratio for all of them does not: "
                "set importance_sampling_level to token or sequence_token, or kl_in to reward"
            )
        if self.kl_in == "token_reward" and self.normalize_advantages == "row":
            raise ValueError("kl_in token_reward gives each token an advantage of its own: normalize_advantages token")

    @property
    def needs(self) -> frozenset[Need]:
        needs: set[Need] = {"rollouts", "old_logps", "reward"}
        if self.kl_coef:
            needs.add("reference")
        if self.entropy_coef:
            needs.add("entropy")
        if self.importance_cap is not None:
            needs.add("rollout_logps")
        return frozenset(needs)

    @property
    def old_logps_dispensable(self) -> bool:
        """Unless the divergence is charged to the rewards."""
        return not self.kl_coef or self.kl_in == "loss"

    def sampled_elsewhere(self) -> None:
        """With `importance_cap: auto`, correct for it."""
        if self._corrects:
            self.importance_cap = IMPORTANCE_CAP

    # ------------------------------------------------------------------ once a collection

    def accept(self, experience: Experience) -> Tensor | None:
        """With dynamic sampling, the rows [B] of prompts whose completions do not all earn the same."""
        if not self.dynamic_sampling:
            return None
        self._check_groups(experience["group"])
        _, deviation, _ = group_moments(experience["scores"].double(), experience["group"])
        return deviation > NO_SPREAD

    def num_kept(self, num_prompts: int, completions: int) -> int:
        """All rows.

        Raises:
            ValueError: completions are to be compared with each other, and there is only one a prompt.
        """
        compared = self.baseline in ("group", "leave_one_out") or self.scale_rewards == "group" or self.dynamic_sampling
        if compared and completions < 2:
            raise ValueError(
                f"{type(self).__name__} compares the completions of a prompt, and here a prompt has only one: set "
                "rollout.completions_per_prompt to 2 or more (8 is usual); one is enough for ReinforcePlusPlus"
            )
        return num_prompts * completions

    def _check_groups(self, group: Tensor) -> None:
        if len(group):
            sizes = group.unique(return_counts=True)[1]
            self.num_kept(len(sizes), int(sizes.min()))

    def shaped_rewards(self, experience: Experience) -> Tensor:
        """The scores [B] less what a missing end and an overlong completion cost, in float64.

        Raises:
            ValueError: a completion is longer than max_completion_length.
        """
        rewards = experience["scores"].double() - self.missing_eos_penalty * (~experience["ended"]).double()
        if self.max_completion_length is None:
            return rewards
        length = experience["loss_mask"].sum(1)
        if len(length) and int(length.max()) > self.max_completion_length:
            raise ValueError(
                f"a completion has {int(length.max())} tokens, more than max_completion_length "
                f"{self.max_completion_length}: set that to sampling.max_new_tokens"
            )
        if self.overlong_cache is not None:
            rewards = rewards + overlong_punishment(length, self.max_completion_length, self.overlong_cache)
        return rewards

    def kl_in_reward(self, experience: Experience) -> Tensor:
        """What each token [B, T] is charged for its divergence from the reference; 0 where that is in the loss."""
        mask = experience["loss_mask"]
        if not self.kl_coef or self.kl_in == "loss":
            return torch.zeros(mask.shape, dtype=torch.float64)
        kl = kl_estimate(experience["old_logps"].double(), experience["ref_logps"].double(), self.kl_estimator)
        return torch.where(mask, self.kl_coef * kl, 0)

    def prepare(self, experience: Experience) -> Experience:
        """Add `advantages`, [B] or, where tokens differ, [B, T], and the metrics of the collection."""
        mask, counted = experience["loss_mask"], rows_that_count(experience)
        group = experience["group"][counted]
        self._check_groups(group)
        kl = self.kl_in_reward(experience)
        rewards = self.shaped_rewards(experience)
        compared = (rewards - kl.sum(1) if self.kl_in == "reward" else rewards)[counted]
        advantages = torch.zeros_like(rewards)
        advantages[counted] = relative_rewards(compared, group, self.baseline, self.scale_rewards)
        if self.normalize_advantages == "row":
            whole = torch.zeros_like(group)
            advantages[counted] = relative_rewards(advantages[counted], whole, "batch", "batch")
        if self.kl_in == "token_reward" or self.normalize_advantages == "token":
            to_the_end = kl.flip(1).cumsum(1).flip(1) if self.kl_in == "token_reward" else torch.zeros_like(kl)
            advantages = torch.where(mask, advantages[:, None] - to_the_end, 0)
        if self.normalize_advantages == "token":
            advantages = masked_whiten(advantages, mask)
        experience["advantages"] = advantages.to(experience["scores"].dtype)
        metrics = reward_metrics(experience["scores"][counted].double(), group, (rewards - kl.sum(1))[counted])
        if "ref_logps" in experience and "old_logps" in experience:  # otherwise `loss` tells
            apart = torch.where(mask, experience["old_logps"] - experience["ref_logps"], 0).sum(1)
            metrics["objective/kl"] = apart.sum().item() / max(int(counted.sum()), 1)
        experience["metrics"] = metrics
        if self.mask_truncated_completions:
            experience["loss_mask"] = mask & experience["ended"][:, None]
        return experience

    # ------------------------------------------------------------------ once a minibatch

    def weight(self, experience: Experience) -> Tensor:
        """The number of completion tokens, or of completions, by the aggregation."""
        return experience["loss_mask"].sum() if self.aggregation == "token" else rows_that_count(experience).sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        """Summed surrogate, with KL and entropy terms when asked.

        Metrics are means over tokens: `val/ratio`, 1 before the first step; `clip_ratio/*_mean`, the share that
        clipping changed; `kl`, by the estimator; `entropy` when it is computed; `sampling/importance_mean`, the weight
        that importance_cap bounds.
        """
        assert output.logps is not None
        mask, advantages = experience["loss_mask"], experience["advantages"]
        advantages = torch.where(mask, advantages if advantages.dim() == 2 else advantages[:, None], 0)
        logps = torch.where(mask, output.logps, 0)
        # with one step a collection the policy is still the one that sampled
        old_logps = torch.where(mask, experience["old_logps"], 0) if "old_logps" in experience else logps.detach()
        ratio = importance_ratio(logps, old_logps, mask, self.importance_sampling_level)
        per_token = surrogate_loss(ratio, advantages, logps, self.surrogate, self.bounds, self.dual_clip)
        low, high = clip_shares(ratio.detach(), advantages, self.surrogate, self.bounds)
        found = {
            "val/ratio": ratio,
            "clip_ratio/low_mean": low,
            "clip_ratio/high_mean": high,
            "clip_ratio/region_mean": low + high,
        }
        if self.importance_cap is not None:
            correction = importance_weights(old_logps, experience["rollout_logps"], mask, self.importance_cap)
            per_token, found["sampling/importance_mean"] = per_token * correction, correction
        if self.kl_coef:
            found["kl"] = kl = kl_estimate(logps, torch.where(mask, experience["ref_logps"], 0), self.kl_estimator)
            if self.kl_in == "loss":
                per_token = per_token + self.kl_coef * kl
        if output.entropy is not None:
            found["entropy"] = entropy = torch.where(mask, output.entropy, 0)
            per_token = per_token - self.entropy_coef * entropy
        count = mask.sum()
        metrics = {name: (torch.where(mask, values.detach(), 0).sum(), count) for name, values in found.items()}
        if self.kl_coef and "old_logps" not in experience:
            apart = torch.where(mask, old_logps - experience["ref_logps"], 0).sum()
            metrics["objective/kl"] = apart, rows_that_count(experience).sum()
        return Loss(aggregate(per_token, mask, self.aggregation, self.max_completion_length), metrics)
