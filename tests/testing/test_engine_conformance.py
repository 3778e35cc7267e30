"""The engines' conformance kit: the built-in engines keep to it, and it finds what it is there to find."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.rollout.engine import CachedEngine, Engine, Generation
from lit_palm.testing import EngineConformance

Factory = Callable[..., Engine]

BUILT_IN: list[Any] = [
    CachedEngine,
    functools.partial(CachedEngine, max_batch_size=4),
    ContinuousEngine,
    functools.partial(ContinuousEngine, max_batch_size=3),
]


class TestBuiltIn(EngineConformance):
    @pytest.fixture(params=BUILT_IN, ids=["cached", "cached-4", "continuous", "continuous-3"])
    def engine(self, request: pytest.FixtureRequest) -> Factory:
        return request.param


# ------------------------------------------------------------------------------------------ planted defects


class Shuffled(CachedEngine):
    """Gives rows back by length."""

    API_VERSION = 1

    def generate(self, network: Any, prompts: Any, *args: Any, **options: Any) -> Generation:
        found = super().generate(network, prompts, *args, **options)
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        return Generation(*([part[i] for i in order] for part in vars(found).values()))


class Raw(CachedEngine):
    """Reports log-probabilities at a temperature of 1."""

    API_VERSION = 1

    def generate(self, network: Any, prompts: Any, sampling: Any, *args: Any, **options: Any) -> Generation:
        found = super().generate(network, prompts, sampling, *args, **options)
        if sampling.temperature not in (0.0, 1.0):
            found.logps = [logps * sampling.temperature for logps in found.logps]
        return found


class OneSeed(CachedEngine):
    """Has one seed for all rows."""

    API_VERSION = 1

    def generate(self, network: Any, prompts: Any, sampling: Any, seeds: Any, **options: Any) -> Generation:
        return super().generate(network, prompts, sampling, seeds[:1].expand(len(seeds)), **options)


class ByPlace(CachedEngine):
    """Draws from the place in the batch."""

    API_VERSION = 1

    def generate(self, network: Any, prompts: Any, sampling: Any, seeds: Any, **options: Any) -> Generation:
        return super().generate(network, prompts, sampling, seeds + torch.arange(len(seeds)), **options)


class WithoutEnd(CachedEngine):
    """Leaves EOS out."""

    API_VERSION = 1

    def generate(self, *args: Any, **options: Any) -> Generation:
        found = super().generate(*args, **options)
        for row, reason in enumerate(found.finish_reason):
            if reason == "eos" and len(found.completions[row]) > 1:
                found.completions[row], found.logps[row] = found.completions[row][:-1], found.logps[row][:-1]
        return found


class Unfiltered(CachedEngine):
    """Does not heed top_k."""

    API_VERSION = 1

    def generate(self, network: Any, prompts: Any, sampling: Any, *args: Any, **options: Any) -> Generation:
        sampling.top_k = None
        return super().generate(network, prompts, sampling, *args, **options)


class LeavesEval(CachedEngine):
    API_VERSION = 1

    def generate(self, network: Any, *args: Any, **options: Any) -> Generation:
        return super().generate(network.eval(), *args, **options)


class Remembers(CachedEngine):
    """Decodes with the weights that it saw first."""

    API_VERSION = 1
    first: Any = None

    def generate(self, network: Any, *args: Any, **options: Any) -> Generation:
        self.first = self.first or copy.deepcopy(network)
        return super().generate(self.first, *args, **options)


class Quiet(CachedEngine):
    """Tells nobody of its tokens."""

    API_VERSION = 1

    def generate(self, *args: Any, on_token: Any = None, **options: Any) -> Generation:
        return super().generate(*args, **options)


class Undocumented(CachedEngine):
    API_VERSION = 1

    def __init__(self, speed: int = 3, **options: Any) -> None:
        super().__init__(**options)
        self.speed = speed


DEFECTS: list[tuple[Any, set[str]]] = [
    (Shuffled, {"test_logps_are_those_of_the_network", "test_a_row_depends_on_its_prompt_and_seed_alone"}),
    (Raw, {"test_logps_are_those_of_the_network"}),
    (OneSeed, {"test_other_seeds_give_other_tokens", "test_a_row_depends_on_its_prompt_and_seed_alone"}),
    (ByPlace, {"test_a_row_depends_on_its_prompt_and_seed_alone"}),
    (WithoutEnd, {"test_eos_ends_a_completion"}),
    (Unfiltered, {"test_filters_are_kept_to"}),
    (LeavesEval, {"test_the_network_is_left_as_it_was"}),
    (Remembers, {"test_new_weights_count_at_once"}),
    (Quiet, {"test_tokens_are_told_in_order"}),
    (Undocumented, {"test_arguments_are_documented"}),
]


@pytest.mark.parametrize(("engine", "expected"), DEFECTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_defect_fails_its_checks(engine: Any, expected: set[str]) -> None:
    for name in expected:
        with pytest.raises(AssertionError):
            getattr(EngineConformance(), name)(engine)


def test_a_class_without_a_fixture_says_so() -> None:
    with pytest.raises(pytest.fail.Exception, match="no fixture `engine`"):
        EngineConformance.engine.__wrapped__(EngineConformance())  # type: ignore[attr-defined]
