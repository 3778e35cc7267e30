"""A Python function of one's own as a reward."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lit_palm.rollout.rewards.base import Reward, RewardBatch, Values

__all__ = ["PythonReward"]


class PythonReward(Reward):
    """Scores completions with a Python function: fn(prompts=, completions=, prompt_ids=, completion_ids=, **columns).

    A function that takes only some of these, and has no `**kwargs`, gets those it names. It returns a list of B
    numbers, or of B lists with a number for each of `completion_ids` (PPO then credits tokens); a module next to where
    the command is run is found too.

    Args:
        function: "package.module.function", or the function itself.
        weight: what its values are multiplied by in the sum.
        name: under which it is logged; None: the function's name.
    """

    def __init__(
        self, function: str | Callable[..., Sequence[float] | Tensor], weight: float = 1.0, name: str | None = None
    ) -> None:
        self.function = _import_function(function) if isinstance(function, str) else function
        if not callable(self.function):
            raise ValueError(f"reward function {function!r} is a {type(self.function).__name__}, which is not callable")
        super().__init__(weight, name or getattr(self.function, "__name__", type(self.function).__name__))
        self._accepts = _parameters(self.function)

    def __call__(self, batch: RewardBatch) -> Values:
        given: dict[str, Any] = {
            "prompts": batch.prompts,
            "completions": batch.completions,
            "prompt_ids": batch.prompt_ids,
            "completion_ids": batch.completion_ids,
        }
        clash = sorted(given.keys() & batch.columns.keys())
        if clash:
            raise ValueError(f"the data has a column {clash[0]!r}, which is what the reward itself passes: rename it")
        given |= batch.columns
        if self._accepts is not None:
            missing = [name for name, needed in self._accepts.items() if needed and name not in given]
            if missing:
                raise ValueError(f"its function needs {', '.join(missing)}; the data offers {', '.join(given)}")
            given = {name: value for name, value in given.items() if name in self._accepts}
        return self.function(**given)


def _import_function(path: str) -> Any:
    """The object `name` of the module `package.module`, given "package.module.name".

    Raises:
        ValueError: when it cannot be imported, naming the path and the cause.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not look where it is run
    module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name:
        raise ValueError(f'reward function {path!r}: write it as "package.module.function"')
    try:
        return getattr(importlib.import_module(module_name), name)
    except Exception as error:  # whatever the module raises, the user must learn which reward it was
        raise ValueError(
            f"reward function {path!r} cannot be imported ({type(error).__name__}: {error}): check the path, and that "
            "its folder is the current one or on PYTHONPATH"
        ) from error


def _parameters(function: Callable[..., Any]) -> dict[str, bool] | None:
    """Keyword parameter -> is it required; None when the function takes any keyword or cannot be inspected."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return None
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {p.name: p.default is inspect.Parameter.empty for p in parameters if p.kind in named}
