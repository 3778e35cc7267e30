"""The scalar head of a published reward model, wherever its maker put it.

`AutoModelForSequenceClassification` calls it `score`; trl's value models `v_head.summary`, Open-Assistant's
`out_proj`, others `reward_head`, `regression_head`, `value_head`, `rm_head`. All are one row of weights over the hidden
states, with or without a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Head", "find_head"]

_OUTPUTS = ("lm_head.weight", "embed_out.weight", "output.weight")


@dataclass
class Head:
    """A row of weights and a bias, by the names they have in the folder."""

    files: Mapping[str, Tensor]
    weight: str
    bias: str | None
    constant: float = 0.0
    """Added to the score; what a folder that was exported here says, whose layout has no bias."""

    def tensors(self) -> dict[str, Tensor]:
        """What a `ScalarNetwork` keeps beside its trunk."""
        weight = self.files[self.weight]
        bias = self.files[self.bias].reshape(1) if self.bias else torch.zeros(1, dtype=weight.dtype)
        bias = bias + self.constant
        # a scalar network computes with float32 buffers
        return {"head.weight": weight, "head.bias": bias, "offset": torch.zeros(()), "scale": torch.ones(())}


def find_head(files: Mapping[str, Tensor], where: str) -> Head:
    """The head among the tensors of a reward model.

    Raises:
        ValueError: there is none, several could be it, or it gives several scores.
    """
    shape = files.shape if hasattr(files, "shape") else lambda name: tuple(files[name].shape)
    flat = [name for name in files if len(shape(name)) == 2 and not name.endswith(_OUTPUTS)]
    found = [name for name in flat if shape(name)[0] == 1]
    if len(found) != 1:
        top = [name for name in flat if name.endswith(("score.weight", "out_proj.weight")) and name.count(".") == 1]
        if not found and top:
            raise ValueError(
                f"{where}: {top[0]} gives {shape(top[0])[0]} scores; a reward model gives one (num_labels 1)"
            )
        raise ValueError(
            f"{where}: a reward model has one row of weights as its head, here "
            f"{'there is none' if not found else ' and '.join(sorted(found)) + ' could be it'}"
        )
    bias = found[0].removesuffix("weight") + "bias"
    return Head(files, found[0], bias if bias in files else None)
