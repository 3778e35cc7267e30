"""Proximal policy optimisation for language (Ouyang et al. 2022), with the details that decide correctness.

Sources: Schulman et al. 2017 (clipping), Ye et al. 2020 (dual clip), Ziegler et al. 2019 (KL-shaped reward, adaptive
coefficient), Huang et al. 2024 "The N+ Implementation Details of RLHF with PPO", Zheng et al. 2023 "Secrets of RLHF I".
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lit_palm.objectives.base import Kind, Need, Objective
from lit_palm.objectives.functional import (
    IMPORTANCE_CAP,
    MAX_EXPONENT,
    KLEstimator,
    RunningMoments,
    importance_weights,
    kl_estimate,
    masked_mean,
    masked_whiten,
)
from lit_palm.rollout.advantages import generalized_advantages
from lit_palm.types import Experience, Loss, Output


class PPO(Objective):
    """Clipped policy gradient with a value network and a KL penalty towards a frozen reference.

    Args:
        clip: the ratio of new to old probability is clipped to 1 +- clip.
        dual_clip: for negative advantages the loss is bounded by -dual_clip * A (Ye et al. 2020; 3 is usual).
        value_clip: new values are clipped to the old ones +- value_clip; None: no clipping.
        value_coef: weight of the value loss beside the policy loss.
        gamma: discount of later rewards.
        lam: lambda of generalised advantage estimation.
        whiten_advantages: mean 0 and variance 1 over the valid tokens of the whole collection.
        kl_coef: beta, the price of one nat of divergence from the reference; 0 needs no reference.
        kl_estimator: k1, k2 or k3 of Schulman 2020.
        kl_in: `reward` shapes the per-token reward, `loss` adds the estimate to the loss (then k2 or k3: the
            gradient of k1 carries no information).
        kl_target: nats a completion; beta is adapted so that the divergence stays near it (Ziegler et al. 2019).
        kl_horizon: completions over which beta adapts.
        entropy_coef: reward for the entropy of the policy, in the loss.
        scale_reward: divide scores, and what rewards say of single tokens, by the standard deviation of all scores so
            far (`running`), by that of the first collection (`ref`), or not at all (`none`).
        center_reward: also subtract the mean of the same scores.
        clip_reward: scores are clipped to +- this after scaling.
        missing_eos_penalty: subtracted from the score of a completion that did not end by itself.
        max_update_kl: an update stops, for this collection, when new and old policy are further apart than this
            (half the mean squared log-ratio a token, `policy/approxkl_avg`); None: never.
        importance_cap: weigh tokens in the policy's loss by min(p_old / p_rollout, importance_cap), where p_rollout is
            what the engine sampled with (2 or 3 is usual); `auto`: 2 where completions come from elsewhere (a remote
            engine, asynchronous rollouts), else none; null: trust the engine.
        value_warmup: during so many first collections only the value network learns.
    """

    kind: ClassVar[Kind] = "policy"

    def __init__(
        self,
        clip: float = 0.2,
        dual_clip: float | None = None,
        value_clip: float | None = 0.2,
        value_coef: float = 0.1,
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten_advantages: bool = True,
        kl_coef: float = 0.05,
        kl_estimator: KLEstimator = "k1",
        kl_in: Literal["reward", "loss"] = "reward",
        kl_target: float | None = None,
        kl_horizon: int = 10_000,
        entropy_coef: float = 0.0,
        scale_reward: Literal["none", "running", "ref"] = "none",
        center_reward: bool = False,
        clip_reward: float | None = None,
        missing_eos_penalty: float = 0.0,
        max_update_kl: float | None = None,
        value_warmup: int = 0,
        importance_cap: float | Literal["auto"] | None = "auto",
    ) -> None:
        if not clip > 0:
            raise ValueError(f"clip must be positive, got {clip}; 0.2 is usual")
        if dual_clip is not None and dual_clip <= 1 + clip:
            raise ValueError(f"dual_clip must exceed 1 + clip = {1 + clip}, got {dual_clip}; 3 is usual")
        for name, value in (("gamma", gamma), ("lam", lam)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if kl_coef < 0 or value_coef < 0 or kl_horizon < 1:
            raise ValueError("kl_coef and value_coef must not be negative, and kl_horizon must be positive")
        for name, limit in (
            ("value_clip", value_clip),
            ("clip_reward", clip_reward),
            ("kl_target", kl_target),
            ("max_update_kl", max_update_kl),
            ("importance_cap", None if importance_cap == "auto" else importance_cap),
        ):
            if limit is not None and not limit > 0:
                raise ValueError(f"{name} must be positive, got {limit}; null turns it off")
        for name, choice, choices in (
            ("kl_estimator", kl_estimator, get_args(KLEstimator)),
            ("kl_in", kl_in, ("reward", "loss")),
            ("scale_reward", scale_reward, ("none", "running", "ref")),
        ):
            if choice not in choices:
                raise ValueError(f"{name} is {choice!r}: choose one of {', '.join(choices)}")
        if kl_target is not None and kl_coef == 0:
            raise ValueError("kl_target adapts kl_coef by factors: start it above 0")
        if kl_in == "loss" and kl_estimator == "k1" and kl_coef:
            raise ValueError("the gradient of k1 in the loss carries no information: use kl_estimator k2 or k3")
        if center_reward and scale_reward == "none":
            raise ValueError("center_reward uses the moments of scale_reward: set that to running or ref")
        self.clip, self.dual_clip = clip, dual_clip
        self.value_clip, self.value_coef = value_clip, value_coef
        self.gamma, self.lam, self.whiten_advantages = gamma, lam, whiten_advantages
        self.kl_coef, self.kl_estimator, self.kl_in = kl_coef, kl_estimator, kl_in
        self.kl_target, self.kl_horizon = kl_target, kl_horizon
        self.entropy_coef = entropy_coef
        self.scale_reward, self.center_reward, self.clip_reward = scale_reward, center_reward, clip_reward
        self.missing_eos_penalty = missing_eos_penalty
        self.max_update_kl = max_update_kl
        self.value_warmup = value_warmup
        self.importance_cap = None if importance_cap == "auto" else importance_cap
        self._corrects = importance_cap == "auto"
        self.needs_reference = kl_coef > 0
        self.moments = RunningMoments()
        self.num_collections = 0

    @property
    def needs(self) -> frozenset[Need]:
        needs: set[Need] = {"rollouts", "old_logps", "value", "reward", "entropy"}
        if self.needs_reference:
            needs.add("reference")
        if self.importance_cap is not None:
            needs.add("rollout_logps")
        return frozenset(needs)

    def sampled_elsewhere(self) -> None:
        """With `importance_cap: auto`, correct for it."""
        if self._corrects:
            self.importance_cap = IMPORTANCE_CAP

    # ------------------------------------------------------------------ once a collection

    def shape_scores(self, scores: Tensor, ended: Tensor) -> Tensor:
        """Scale, centre and clip the scores [B], then charge completions that did not end."""
        if self.scale_reward == "running" or (self.scale_reward == "ref" and self.moments.count == 0):
            self.moments.update(scores)
        if self.scale_reward != "none":
            if self.center_reward:
                scores = scores - self.moments.mean
            scores = scores / self.score_scale
        if self.clip_reward is not None:
            scores = scores.clamp(-self.clip_reward, self.clip_reward)
        return scores - self.missing_eos_penalty * (~ended).to(scores.dtype)

    @property
    def score_scale(self) -> float:
        """What scores are divided by."""
        return 1.0 if self.scale_reward == "none" else max(self.moments.std, 1e-8)

    def prepare(self, experience: Experience) -> Experience:
        """Add `advantages`, `returns` [B, T] and the `objective/*` metrics; adapt the KL coefficient.

        Where rewards speak of single tokens (`token_rewards`), each token gets its own; the last one gets the rest of
        the completion's score, as it was shaped.
        """
        mask = experience["loss_mask"]
        old_logps = experience["old_logps"]
        scores = self.shape_scores(experience["scores"], experience["ended"])
        rewards = torch.zeros_like(old_logps)
        kl = torch.zeros_like(old_logps)
        if self.needs_reference:
            kl = torch.where(mask, kl_estimate(old_logps, experience["ref_logps"], self.kl_estimator), 0)
            if self.kl_in == "reward":
                rewards = -self.kl_coef * kl
        non_score = rewards.sum(1)
        last = (mask * torch.arange(mask.shape[1])).argmax(1)
        remaining = scores
        if "token_rewards" in experience:
            earlier = mask & (torch.arange(mask.shape[1]) < last[:, None])
            dense = torch.where(earlier, experience["token_rewards"] / self.score_scale, 0)
            rewards, remaining = rewards + dense, scores - dense.sum(1)
        rewards[torch.arange(len(rewards)), last] += remaining
        advantages, returns = generalized_advantages(rewards, experience["values"], mask, self.gamma, self.lam)
        experience["returns"] = returns
        experience["advantages"] = masked_whiten(advantages, mask) if self.whiten_advantages else advantages

        # what people read as "the KL" is always k1 against the reference, whatever the loss uses
        k1 = (torch.where(mask, old_logps - experience["ref_logps"], 0).sum(1)).mean() if self.needs_reference else None
        residual = torch.where(mask, returns - experience["values"], 0)
        total_var = torch.where(mask, returns - masked_mean(returns, mask), 0).square().sum().clamp(min=1e-8)
        residual_var = torch.where(mask, residual - masked_mean(residual, mask), 0).square().sum()
        metrics = {
            "objective/scores": experience["scores"].mean().item(),
            "objective/non_score_reward": non_score.mean().item(),
            "objective/rlhf_reward": (non_score + scores).mean().item(),
            "objective/entropy": -torch.where(mask, old_logps, 0).sum(1).mean().item(),
            "objective/kl_coef": self.kl_coef,
            "val/num_eos_tokens": float(experience["ended"].sum()),
            "value/explained_var": 1 - (residual_var / total_var).item(),
        }
        if k1 is not None:
            metrics["objective/kl"] = k1.item()
            if self.kl_target is not None:
                self._adapt(k1.item(), experience.num_rows)
        experience["metrics"] = metrics
        self.num_collections += 1
        return experience

    def _adapt(self, kl: float, num_rows: int) -> None:
        """Ziegler et al. 2019, section 2.2: beta <- beta (1 + clip(KL / target - 1, +-.2) n / horizon)."""
        assert self.kl_target is not None
        if 0.2 * num_rows >= self.kl_horizon:
            raise ValueError(
                f"kl_horizon {self.kl_horizon} is too short for collections of {num_rows} completions, of which one "
                f"could make kl_coef zero or negative: use more than {num_rows // 5}; 10000 is usual"
            )
        error = min(max(kl / self.kl_target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * num_rows / self.kl_horizon

    # ------------------------------------------------------------------ once a minibatch

    def weight(self, experience: Experience) -> Tensor:
        """The number of completion tokens."""
        return experience["loss_mask"].sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        """Summed clipped surrogate plus value loss (and KL and entropy terms when asked)."""
        mask, advantages = experience["loss_mask"], experience["advantages"]
        assert output.logps is not None and output.values is not None and output.entropy is not None
        count = mask.sum()

        def total(values: Tensor) -> Tensor:
            return torch.where(mask, values, 0).sum()

        log_ratio = torch.where(mask, output.logps - experience["old_logps"], 0).clamp(-MAX_EXPONENT, MAX_EXPONENT)
        ratio = log_ratio.exp()
        unclipped = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - self.clip, 1 + self.clip)
        per_token = torch.maximum(unclipped, clipped)
        if self.dual_clip is not None:
            bound = -advantages * self.dual_clip
            per_token = torch.where(advantages < 0, torch.minimum(per_token, bound), per_token)
        if self.importance_cap is not None:
            rollout_logps, cap = experience["rollout_logps"], self.importance_cap
            per_token = per_token * importance_weights(experience["old_logps"], rollout_logps, mask, cap)
        policy_loss = total(per_token)

        values, old_values, returns = output.values, experience["values"], experience["returns"]
        squared = (values - returns).square()
        value_clipped = torch.zeros_like(mask)
        if self.value_clip is not None:
            near = old_values + (values - old_values).clamp(-self.value_clip, self.value_clip)
            value_clipped = (near - returns).square() > squared
            squared = torch.maximum(squared, (near - returns).square())
        value_loss = 0.5 * total(squared)

        loss = policy_loss + self.value_coef * value_loss
        entropy = total(output.entropy)
        if self.entropy_coef:
            loss = loss - self.entropy_coef * entropy
        if self.kl_in == "loss" and self.kl_coef:
            loss = loss + self.kl_coef * total(kl_estimate(output.logps, experience["ref_logps"], self.kl_estimator))

        with torch.no_grad():
            mean_ratio = total(ratio) / count.clamp(min=1)
            metrics = {
                "policy/approxkl_avg": (0.5 * total(log_ratio.square()), count),
                "policy/clipfrac_avg": (total((clipped > unclipped).float()), count),
                "policy/entropy_avg": (entropy, count),
                "loss/policy_avg": (policy_loss, count),
                "loss/value_avg": (value_loss, count),
                "val/clipfrac_avg": (total(value_clipped.float()), count),
                "val/ratio": (total(ratio), count),
                "val/ratio_var": (total((ratio - mean_ratio).square()), count),
            }
        frozen = frozenset({"policy"}) if self.num_collections <= self.value_warmup else frozenset()
        return Loss(loss, {k: (v.detach(), n) for k, (v, n) in metrics.items()}, frozen)

    @property
    def watches(self) -> tuple[str, ...]:
        return ("policy/approxkl_avg",) if self.max_update_kl is not None else ()

    def after_step(self, metrics: dict[str, float]) -> bool:
        """Stop this collection's update when the policy has moved further than `max_update_kl`."""
        return self.max_update_kl is not None and metrics["policy/approxkl_avg"] > self.max_update_kl

    # ------------------------------------------------------------------ across steps

    def state_dict(self) -> dict[str, Any]:
        return {
            "kl_coef": self.kl_coef,
            "num_collections": self.num_collections,
            "moments": self.moments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # YAML wins over the checkpoint where the coefficient is fixed; an adaptive one continues where it was
        if self.kl_target is not None:
            self.kl_coef = float(state["kl_coef"])
        self.num_collections = int(state["num_collections"])
        self.moments.load_state_dict(state["moments"])
