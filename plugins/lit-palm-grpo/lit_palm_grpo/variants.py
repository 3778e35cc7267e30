"""The published relatives of GRPO: the same objective with other defaults, each under its own name.

Every argument of `GRPO` can be given to each of them; the signatures show what differs.
"""

from __future__ import annotations

from typing import Any, ClassVar

from lit_palm.objectives.functional import KLEstimator
from lit_palm_grpo.advantages import Baseline, Scale
from lit_palm_grpo.grpo import GRPO, KLPlace, Normalization
from lit_palm_grpo.surrogates import Aggregation, ImportanceLevel, Surrogate

__all__ = ["CISPO", "DAPO", "GSPO", "RLOO", "DrGRPO", "ReinforcePlusPlus"]


class DrGRPO(GRPO):
    """GRPO without its two biases: no division by a prompt's standard deviation, none by a completion's length.

    Liu et al. 2025, "Understanding R1-Zero-Like Training". No KL.

    Args:
        max_completion_length: what the sum over a completion's tokens is divided by: sampling.max_new_tokens.
        aggregation: `constant`: see max_completion_length.
        scale_rewards: `none`: the difference to the baseline as it is.
        kl_coef: 0: no reference is loaded.
        **kwargs: any argument of GRPO.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(
        self,
        max_completion_length: int | None = 64,
        aggregation: Aggregation = "constant",
        scale_rewards: Scale = "none",
        kl_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            max_completion_length=max_completion_length,
            aggregation=aggregation,
            scale_rewards=scale_rewards,
            kl_coef=kl_coef,
            **kwargs,
        )


class RLOO(GRPO):
    """REINFORCE leave-one-out: a completion is one action, compared with the prompt's other completions.

    Ahmadian et al. 2024, "Back to Basics"; the ratio of whole completions and its clipping, for more than
    one step a collection, are TRL's. With one step the gradient is that of the paper.

    Args:
        importance_sampling_level: `trajectory`: the completion is the action.
        baseline: `leave_one_out`: mean reward of the others.
        scale_rewards: `none`: the difference to the baseline as it is.
        kl_coef: price of one nat away from the reference.
        kl_estimator: k1, summed over the completion.
        kl_in: `reward`: subtracted before the baseline.
        **kwargs: any argument of GRPO.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(
        self,
        importance_sampling_level: ImportanceLevel = "trajectory",
        baseline: Baseline = "leave_one_out",
        scale_rewards: Scale = "none",
        kl_coef: float = 0.05,
        kl_estimator: KLEstimator = "k1",
        kl_in: KLPlace = "reward",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            importance_sampling_level=importance_sampling_level,
            baseline=baseline,
            scale_rewards=scale_rewards,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_in=kl_in,
            **kwargs,
        )


class ReinforcePlusPlus(GRPO):
    """REINFORCE++: no groups; the advantage is the reward to go, less its KL, whitened over all tokens of a collection.

    Hu et al. 2025. One completion a prompt is enough. `baseline: group` gives REINFORCE++-baseline, which
    the paper runs with `kl_in: loss` and `kl_estimator: k2`.

    Args:
        aggregation: `token`: the mean over all tokens, as PPO's.
        baseline: `none`: whitening subtracts the mean of the collection.
        scale_rewards: `none`: whitening divides.
        normalize_advantages: `token`: whitened over all tokens of the collection.
        kl_coef: price of one nat away from the reference.
        kl_estimator: k1.
        kl_in: `token_reward`: a token pays for the divergence from it to the end.
        **kwargs: any argument of GRPO.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(
        self,
        aggregation: Aggregation = "token",
        baseline: Baseline = "none",
        scale_rewards: Scale = "none",
        normalize_advantages: Normalization = "token",
        kl_coef: float = 0.01,
        kl_estimator: KLEstimator = "k1",
        kl_in: KLPlace = "token_reward",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            aggregation=aggregation,
            baseline=baseline,
            scale_rewards=scale_rewards,
            normalize_advantages=normalize_advantages,
            kl_coef=kl_coef,
            kl_estimator=kl_estimator,
            kl_in=kl_in,
            **kwargs,
        )


class DAPO(GRPO):
    """Decoupled clip and dynamic sampling policy optimisation: more room upwards, only prompts that teach, all tokens.

    Yu et al. 2025, equation 8. Its soft overlong punishment needs to know the longest completion: set
    max_completion_length to sampling.max_new_tokens and overlong_cache to about a fifth of it. No KL.

    Args:
        clip_high: the ratio is clipped from above at 1 + clip_high.
        aggregation: `token`: the mean over all tokens.
        kl_coef: 0: no reference is loaded.
        dynamic_sampling: prompts whose completions all earn the same are replaced, for up to rollout.max_rounds rounds.
        **kwargs: any argument of GRPO.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(
        self,
        clip_high: float | None = 0.28,
        aggregation: Aggregation = "token",
        kl_coef: float = 0.0,
        dynamic_sampling: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            clip_high=clip_high, aggregation=aggregation, kl_coef=kl_coef, dynamic_sampling=dynamic_sampling, **kwargs
        )


class GSPO(GRPO):
    """Group sequence policy optimisation: one ratio for each completion, the geometric mean over its tokens.

    Zheng et al. 2025, equation 5, with the clipping of its section 5.1: a mean over tokens moves little, so the range
    is small. `importance_sampling_level: sequence_token` is its GSPO-token. No KL.

    Args:
        clip_low: the ratio is clipped from below at 1 - clip_low.
        clip_high: the ratio is clipped from above at 1 + clip_high.
        importance_sampling_level: `sequence`: the geometric mean over a completion's tokens.
        kl_coef: 0: no reference is loaded.
        **kwargs: any argument of GRPO.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(
        self,
        clip_low: float | None = 3e-4,
        clip_high: float | None = 4e-4,
        importance_sampling_level: ImportanceLevel = "sequence",
        kl_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            clip_low=clip_low,
            clip_high=clip_high,
            importance_sampling_level=importance_sampling_level,
            kl_coef=kl_coef,
            **kwargs,
        )


class CISPO(GRPO):
    """Clipped importance-sampling-weight policy optimisation: no token loses its gradient, its weight is bounded.

    MiniMax 2025 (MiniMax-M1), equations 4 and 5: REINFORCE weighted by the ratio, which is clipped from above only and
    carries no gradient, averaged over all tokens. No KL.

    Args:
        clip_low: null: no bound from below.
        clip_high: the ratio is clipped at 1 + clip_high; 4 is ScaleRL's (Khatri et al. 2025) bound of 5.
        surrogate: `cispo`.
        aggregation: `token`: the mean over all tokens.
        kl_coef: 0: no reference is loaded.
        **kwargs: any argument of GRPO.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(
        self,
        clip_low: float | None = None,
        clip_high: float | None = 4.0,
        surrogate: Surrogate = "cispo",
        aggregation: Aggregation = "token",
        kl_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            clip_low=clip_low,
            clip_high=clip_high,
            surrogate=surrogate,
            aggregation=aggregation,
            kl_coef=kl_coef,
            **kwargs,
        )
