"""A network as a foreign file describes it: our configuration, and our weights made from theirs when asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lit_palm.data.tokenizers import Tokenizer
from lit_palm.foreign.tensors import Tensors
from lit_palm.models.base import NetworkConfig

__all__ = ["ForeignNetwork", "Recipe", "Weights", "check_floating", "is_nonzero"]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Recipe:
    """How one weight of ours is made.

    Args:
        shape: of the result.
        dtype: of the result.
        make: makes it; called each time that it is asked for.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


class Weights(Mapping[str, Tensor]):
    """Weights by their names here, each made when it is asked for, so that one at a time is in memory."""

    def __init__(self, recipes: Mapping[str, Recipe]) -> None:
        self.recipes = recipes

    def __getitem__(self, name: str) -> Tensor:
        recipe = self.recipes[name]
        made = recipe.make().to(recipe.dtype)
        assert made.shape == recipe.shape, f"{name}: {tuple(made.shape)} instead of {recipe.shape}"
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self.recipes)

    def __len__(self) -> int:
        return len(self.recipes)

    @property
    def shapes(self) -> dict[str, Tensor]:
        """The weights without their values, on the meta device."""
        return {k: torch.empty(r.shape, dtype=r.dtype, device="meta") for k, r in self.recipes.items()}


@dataclass
class ForeignNetwork:
    """What a reader gives back.

    Args:
        where: what was read.
        config: of the network, or of the trunk below a scalar head.
        weights: by their names here.
        role: `reward` is a network with a scalar head.
        pooling: how the scalar head reads.
        tokenizer: the one that comes along, or None.
        notes: what the user should know: what was detected, what was left out.
        adapters: LoRA that was kept apart: name -> (configuration for `peft`, weights).
    """

    where: str
    config: NetworkConfig
    weights: Weights
    role: Literal["policy", "reward"] = "policy"
    pooling: Literal["last", "mean"] | None = None
    tokenizer: Tokenizer | None = None
    notes: list[str] = field(default_factory=list)
    adapters: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = field(default_factory=dict)


def check_floating(tensors: Tensors) -> None:
    """Refuse weights that are quantised.

    Raises:
        ValueError: naming the first.
    """
    for name in tensors:
        if tensors.dtype(name) not in _FLOATS:
            raise ValueError(
                f"{os.fspath(tensors.where)}: {name} is of type {str(tensors.dtype(name)).removeprefix('torch.')}: "
                "quantised weights cannot be trained on; take the model's unquantised files"
            )


def is_nonzero(tensors: Tensors, names: Sequence[str]) -> str | None:
    """The first of the named tensors with a number other than 0, or None."""
    return next((name for name in names if bool(tensors[name].any())), None)
