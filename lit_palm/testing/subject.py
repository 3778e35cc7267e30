"""What the checks of an objective start from: the author's fixture, and what can be set otherwise.

`Subject` holds the settings that `ObjectiveConformance` documents; the rest of the file finds out how a class is named
in YAML, which arguments it has and which entry point leads to it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from importlib import metadata
from typing import Any, ClassVar

import pytest

from lit_palm.objectives.base import Objective
from lit_palm.plugins import Plugin, discover
from lit_palm.testing.batches import DataKind, natural_data, tiny_batch, tiny_experience
from lit_palm.types import Experience, Output

__all__ = ["Factory", "Subject", "class_and_arguments", "class_path", "distribution_of", "entry_of", "parameters"]

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
        module_options: further arguments of the LightningModule in the runs, as in YAML.
        data_options: further arguments of the data module in the runs, as in YAML.
        rollout: fields of `RolloutConfig` to set otherwise in the runs.
    """

    data: ClassVar[DataKind | None] = None
    completions_per_prompt: ClassVar[int] = 4
    ratio: ClassVar[str | None] = "val/ratio"
    statistics: ClassVar[tuple[str, ...]] = ("*min_*", "*max_*", "*/min", "*/max", "*_var", "*_std", "*/std", "*/var")
    installed: ClassVar[bool | None] = None
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
    """The class behind a factory, with the arguments it is given, by name."""
    arguments: dict[str, Any] = {}
    positional: tuple[Any, ...] = ()
    made: Any = objective
    while isinstance(made, functools.partial):
        positional, arguments, made = made.args + positional, {**made.keywords, **arguments}, made.func
    assert isinstance(made, type) and issubclass(made, Objective), (
        "the fixture `objective` returns neither a class nor a functools.partial of one, so that nobody could write it "
        "in YAML: return MyLoss, or functools.partial(MyLoss, beta=0.3), and no lambda or function"
    )
    names = list(parameters(made))
    return made, {**dict(zip(names, positional, strict=False)), **arguments}


def class_path(cls: type) -> str:
    """The dotted name under which a class can be imported by another process."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    found: Any = None
    if "<locals>" not in path and cls.__module__ != "__main__":
        found = importlib.import_module(cls.__module__)
        for name in cls.__qualname__.split("."):
            found = getattr(found, name, None)
    assert found is cls, (
        f"{path} cannot be imported under that name, so neither YAML nor another process can find it: define the class "
        "at the top level of a module, not inside a function"
    )
    return path


def parameters(cls: type) -> dict[str, tuple[inspect.Parameter, type]]:
    """Constructor arguments by name, each with the class whose `__init__` takes it; `**kwargs` leads to the base's."""
    found: dict[str, tuple[inspect.Parameter, type]] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        given = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        for parameter in given:
            if parameter.kind is not parameter.VAR_KEYWORD:
                found.setdefault(parameter.name, (parameter, base))
        if not any(p.kind is p.VAR_KEYWORD for p in given):
            break
    return found


def entry_of(cls: type) -> Plugin | None:
    """The built-in or entry point that leads to a class; only those of its own package are imported."""
    package = cls.__module__.partition(".")[0]
    for plugin in discover():
        module, _, attribute = plugin.value.partition("[")[0].partition(":")
        if plugin.group != GROUP or module.strip().partition(".")[0] != package:
            continue
        try:
            found: Any = importlib.import_module(module.strip())
            for name in attribute.strip().split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError):
            continue
        if found is cls:
            return plugin
    return None


def distribution_of(cls: type) -> str | None:
    """The installed distribution that a class's package comes from."""
    names = metadata.packages_distributions().get(cls.__module__.partition(".")[0])
    return names[0] if names else None
