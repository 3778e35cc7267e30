"""What the checks of an objective start from: the author's fixture, and what can be set otherwise.

`Subject` holds the settings that `ObjectiveConformance` documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from lit_palm.objectives.base import Objective
from lit_palm.testing import entries
from lit_palm.testing.batches import DataKind, natural_data, tiny_batch, tiny_experience
from lit_palm.types import Experience, Output

__all__ = ["GROUP", "Factory", "Subject", "class_and_arguments"]

Factory = Callable[[], Objective]
"""A class, or functools.partial of one: called whenever a fresh objective is needed."""

GROUP = "lit_palm.objectives"


class Subject:
    """The objective under test and how it is to be fed; class attributes that a subclass overrides.

    Attributes:
        data: what it learns from; None: `prompts` where it needs rollouts, `pairs` where it is grouped, `ratings` for
            other rewards, else `demonstrations`.
        completions_per_prompt: completions of one prompt in a collection.
        ratio: name of the metric that is the mean ratio of new to old probability; None: it forms no ratio, although
            it needs `old_logps`.
        statistics: patterns of metrics that are statistics of a micro-batch (extremes, deviations) and not sums.
        installed: whether the class comes from an installed distribution and must have an entry point; None: found
            out. False for a variant that only tests use.
        network: what `model.network` is in the runs, as `{class_path, init_args}`, of an objective that comes with a
            network of its own; None: a PaLM of ten thousand parameters.
        module_options: further arguments of the LightningModule in the runs, as in YAML.
        data_options: further arguments of the data module in the runs, as in YAML.
        rollout: fields of `RolloutConfig` to set otherwise in the runs.
    """

    data: ClassVar[DataKind | None] = None
    completions_per_prompt: ClassVar[int] = 4
    ratio: ClassVar[str | None] = "val/ratio"
    statistics: ClassVar[tuple[str, ...]] = ("*min_*", "*max_*", "*/min", "*/max", "*_var", "*_std", "*/std", "*/var")
    installed: ClassVar[bool | None] = None
    network: ClassVar[dict[str, Any] | None] = None
    module_options: ClassVar[dict[str, Any]] = {}
    data_options: ClassVar[dict[str, Any]] = {}
    rollout: ClassVar[dict[str, Any]] = {}

    @pytest.fixture
    def objective(self) -> Factory:
        """The class under test, or functools.partial of it with arguments."""
        pytest.fail(
            f"{type(self).__name__} has no fixture `objective`: define one that returns your class, or "
            "functools.partial(YourClass, argument=value)"
        )

    def make(self, objective: Factory) -> Objective:
        """A fresh objective."""
        made = objective()
        assert isinstance(made, Objective), (
            f"the fixture `objective` must return a class, or a functools.partial of one: calling it gave a "
            f"{type(made).__name__}, which is no lit_palm.Objective"
        )
        return made

    def data_of(self, objective: Objective) -> DataKind:
        """What it learns from."""
        return self.data or natural_data(objective)

    def collection(self, objective: Objective, **options: Any) -> Experience:
        """A batch of its kind of data, before `prepare`."""
        options.setdefault("completions_per_prompt", self.completions_per_prompt)
        return tiny_experience(self.data_of(objective), objective.needs, **options)

    def batch(self, objective: Objective, **options: Any) -> tuple[Experience, Output]:
        """A batch as its `loss` gets it, with what the networks computed."""
        options.setdefault("completions_per_prompt", self.completions_per_prompt)
        return tiny_batch(objective, self.data_of(objective), **options)

    def samples(self, objective: Objective) -> None:
        """Skip what is about collections when the objective has none."""
        if "rollouts" not in objective.needs:
            pytest.skip(f"{type(objective).__name__} learns from given completions: there is no collection to prepare")


def class_and_arguments(objective: Factory) -> tuple[type[Objective], dict[str, Any]]:
    """The class behind the fixture `objective`, with the arguments it is given, by name."""
    return entries.class_and_arguments(objective, Objective, "objective")
