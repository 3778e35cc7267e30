"""Names, defaults and refusals: what a person meets before anything runs."""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import Any

import lit_palm_grpo
import pytest
from lit_palm_grpo import CISPO, DAPO, GRPO, GSPO, RLOO, TPO, DrGRPO, FlowRL, ReinforcePlusPlus

from lit_palm import Objective

VARIANTS = [GRPO, DrGRPO, RLOO, ReinforcePlusPlus, DAPO, GSPO, CISPO]
ARGUMENTS = list(inspect.signature(GRPO).parameters)


def test_every_class_is_an_entry_point_of_its_own_name() -> None:
    found = {e.name: e for e in metadata.entry_points(group="lit_palm.objectives") if "lit_palm_grpo" in e.value}
    classes = [*VARIANTS, TPO, FlowRL]
    assert set(found) == {v.__name__ for v in classes} == set(lit_palm_grpo.__all__)
    for variant in classes:
        assert found[variant.__name__].load() is variant
        assert issubclass(variant, Objective) and vars(variant)["API_VERSION"] == 1
        assert variant.grouped and variant.kind == "policy" and not variant().coupled


@pytest.mark.parametrize("variant", VARIANTS[1:])
def test_a_variant_is_grpo_with_other_defaults(variant: type[GRPO]) -> None:
    """Its signature says which; every argument of GRPO works on it; and with GRPO's defaults it is GRPO."""
    own = {k: p.default for k, p in inspect.signature(variant).parameters.items() if p.kind is not p.VAR_KEYWORD}
    common = {k: p.default for k, p in inspect.signature(GRPO).parameters.items()}
    assert own.keys() < common.keys() and all(own[name] != common[name] for name in own)
    assert vars(variant()) == vars(GRPO(**own)) and vars(variant(**common)) == vars(GRPO())
    documented = inspect.getdoc(variant) or ""
    assert all(f"    {name}: " in documented for name in own)
    with pytest.raises(TypeError, match="clip_hihg"):
        variant(clip_hihg=0.3)


def test_every_argument_is_documented() -> None:
    documented = inspect.getdoc(GRPO) or ""
    assert all(f"    {name}: " in documented for name in ARGUMENTS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_each_needs(variant: type[GRPO]) -> None:
    needs = {"rollouts", "old_logps", "reward"}
    assert variant(kl_coef=0.0).needs == needs
    assert variant(kl_coef=0.1).needs == needs | {"reference"}
    assert variant(kl_coef=0.0, entropy_coef=0.1).needs == needs | {"entropy"}
    assert variant(kl_coef=0.0, importance_cap=2.0).needs == needs | {"rollout_logps"}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"clip_low": 0.0}, "clip_low must be between 0 and 1, got 0.0"),
        ({"clip_low": 1.5}, "clip_low must be between 0 and 1"),
        ({"clip_low": float("nan")}, "clip_low"),
        ({"clip_high": -0.2}, r"clip_high must be positive, got -0\.2; null"),
        ({"clip_high": 0.0}, "clip_high must be positive"),
        ({"dual_clip": 1.1}, "dual_clip 1.1 must be more than 1 \\+ clip_high"),
        ({"surrogate": "cispo", "dual_clip": 3.0}, "dual_clip bounds the clipped surrogate"),
        ({"surrogate": "sapo"}, "surrogate is 'sapo': choose one of clip, cispo"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level is 'word': choose one of token, sequence"),
        ({"aggregation": "mean"}, "aggregation is 'mean': choose one of row, token, constant"),
        ({"aggregation": "constant"}, r"aggregation constant needs max_completion_length: .*sampling\.max_new_tokens"),
        ({"overlong_cache": 4}, "overlong_cache needs max_completion_length"),
        ({"overlong_cache": 9, "max_completion_length": 8}, "overlong_cache 9 is the last part of .* 8"),
        ({"overlong_cache": 0, "max_completion_length": 8}, "overlong_cache must be positive"),
        ({"max_completion_length": 0}, "max_completion_length must be positive"),
        ({"baseline": "value"}, "baseline is 'value': choose one of group, leave_one_out, batch, none"),
        ({"scale_rewards": "std"}, "scale_rewards is 'std'"),
        ({"normalize_advantages": True}, "normalize_advantages is True: choose one of none, row, token"),
        ({"kl_coef": -0.1}, "kl_coef must not be negative"),
        ({"kl_coef": float("nan")}, "kl_coef must not be negative, got nan"),
        ({"kl_estimator": "k4"}, "kl_estimator is 'k4'"),
        ({"kl_estimator": "k1"}, "k1 in the loss carries no information"),
        ({"kl_in": "rewards"}, "kl_in is 'rewards'"),
        ({"kl_in": "token_reward", "importance_sampling_level": "sequence"}, "tells the tokens .* apart"),
        ({"kl_in": "token_reward", "normalize_advantages": "row"}, "normalize_advantages token"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty must not be negative"),
        ({"importance_cap": 0.0}, "importance_cap must be positive"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPO(**options)


def test_where_there_is_no_divergence_its_estimator_does_not_matter() -> None:
    RLOO(kl_coef=0.0, kl_in="loss")
    ReinforcePlusPlus(kl_coef=0.0, importance_sampling_level="sequence")


def test_published_settings() -> None:
    assert (GSPO().clip_low, GSPO().clip_high) == (3e-4, 4e-4)
    assert (DAPO().clip_low, DAPO().clip_high, DAPO().aggregation, DAPO().dynamic_sampling) == (
        0.2,
        0.28,
        "token",
        True,
    )
    assert CISPO().bounds == (0.0, 5.0) and DrGRPO().scale_rewards == "none"
