"""From the names of weights in a folder to those of our networks.

Nearly always they are those of the model of `transformers`, save for a prefix that older files lack or for the base
model's own name. Where they are not, `transformers` itself puts the weights together, in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lit_palm.models.huggingface_config import HuggingFaceConfig
from lit_palm.models.weights import named_weights

__all__ = ["Renamed", "rename", "whole_model"]


_RENAMED = {"lm_head.weight": "embed_out.weight"}
"""What weights were called before `transformers` gave them one name for all architectures."""


class Renamed(Mapping[str, Tensor]):
    """Weights under other names.

    Args:
        weights: the weights.
        names: name -> name in `weights`; none: all as they are.
        prefix: put before each name.
    """

    def __init__(self, weights: Mapping[str, Tensor], names: dict[str, str], prefix: str) -> None:
        self._weights = weights
        self._names = {prefix + name: there for name, there in (names or {name: name for name in weights}).items()}
        self._head: dict[str, Tensor] = {}

    def with_head(self, head: dict[str, Tensor], prefix: str) -> Renamed:
        """Beside them the weights of a scalar head."""
        self._head = {prefix + name: tensor for name, tensor in head.items()}
        return self

    def __getitem__(self, name: str) -> Tensor:
        return self._head[name] if name in self._head else self._weights[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self._head

    def __len__(self) -> int:
        return len(self._names) + len(self._head)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight, without reading it where that is possible."""
        if name in self._head:
            return tuple(self._head[name].shape)
        of: Any = getattr(self._weights, "shape", None)
        there = self._names[name]
        return tuple(of(there)) if of is not None else tuple(self._weights[there].shape)


def rename(config: HuggingFaceConfig, there: Mapping[str, Tensor], below_head: bool = False) -> dict[str, str] | None:
    """For each weight of the model, its name in a folder; None when some are not to be found under a name like theirs.

    What a folder holds beside them (masks and frequencies that older versions wrote, a tied output weight) is passed
    over.

    Args:
        config: of the model.
        there: the weights of the folder.
        below_head: the model is the trunk of a scalar network, which has no output weight.
    """
    lm = _skeleton(config, below_head)
    base = f"{lm.base_model_prefix}."
    names = {}
    for name, _ in named_weights(lm):
        inner = name.removeprefix(base)
        candidates = (name, inner if name.startswith(base) else "", base + name, _RENAMED.get(name, ""))
        found = next((c for c in candidates if c in there), None)
        if found is None:
            return None
        names[name] = found
    return names


def whole_model(path: str, config: HuggingFaceConfig, below_head: bool = False, **options: Any) -> dict[str, Tensor]:
    """All weights of the model, as `transformers` reads them, by the names of our network.

    Raises:
        ValueError: it cannot read them, or some are missing.
    """
    from transformers import AutoModelForCausalLM

    read: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, found = read(path, output_loading_info=True, trust_remote_code=config.code is not None, **options)
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: transformers cannot read its weights ({why})") from error
    own = {name for name, _ in named_weights(_skeleton(config, below_head))}
    lost = sorted(set(found["missing_keys"]) & own)
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise ValueError(f"{path}: the weights of the model lack {', '.join(lost[:3])}{more}")
    return {name: tensor.detach() for name, tensor in named_weights(model) if name in own}


def _skeleton(config: HuggingFaceConfig, below_head: bool) -> Any:
    """The model of `transformers` without memory."""
    with torch.device("meta"):
        network: Any = config.build()
    if below_head:
        network.drop_output()
    return network.lm
