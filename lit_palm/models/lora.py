"""LoRA (Hu et al. 2022): small trained matrices beside frozen ones, what they are and where they go.

    y = W x + s * B A x        A: [r, in], B: [out, r] and zero at first; s = alpha / r, or alpha / sqrt(r) with rsLoRA

With DoRA (Liu et al. 2024) the rows of W + s B A are scaled to a trained magnitude m, which starts at those of W:

    y = m / ||W + s B A|| * (W + s B A) x        the norm of each row; no gradient flows through it

The layers are those of `peft`; `lit_palm.models.adapted` puts several sets of them on one network.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lit_palm.models.base import Network

__all__ = ["PARTS", "LoRA", "is_transposed", "linear_layers", "merge", "split_name", "targets_of"]

PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")
"""What peft calls the weights of an adapter."""

_NAME = re.compile(rf"(?:.*\.)?trunk\.(?P<layer>.+)\.(?P<part>{'|'.join(PARTS)})\.(?P<role>\w+)\.(?P<own>weight|bias)")
_HEAD = re.compile(r"(?:.*\.)?heads\.(?P<role>\w+)\.(?P<own>.+)")

Bits = Literal["4bit", "8bit"]


@dataclass
class LoRA:
    """What is trained beside a frozen network.

    Raises:
        ValueError: a field is out of its range, or a package is missing.
    """

    rank: int = 16
    """Rank r of the update of each matrix."""
    alpha: float = 32.0
    """The update is multiplied by alpha / rank."""
    targets: list[str] | str | None = None
    """Names of the linear layers that get an update, such as [q_proj, v_proj]; "all-linear": every one in the blocks;
    null: what is usual for the architecture."""
    dropout: float = 0.0
    """Dropped share of what the update reads, while training."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead, so that large ranks learn as fast (Kalajdzievski 2023)."""
    dora: bool = False
    """Train the length of each row of the sum apart from its direction (DoRA, Liu et al. 2024); slower, takes more
    memory."""
    quantize: Bits | None = None
    """Keep the frozen matrices in 4 bits (NF4; QLoRA, Dettmers et al. 2023) or 8; needs bitsandbytes."""

    merge_to_sample: bool = False
    """Put the update into the matrices while completions are sampled: quicker, for a copy of the adapted matrices in
    memory meanwhile. Only where they are float32, not quantised, and not spread over processes. Where a PaLM decodes
    from packed copies, these hold it anyway."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}: set it to at least 1; 16 is usual")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha is {self.alpha}: set it above 0; twice the rank is usual")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"lora.dropout is {self.dropout}: choose a share from 0 up to, not including, 1")
        if self.quantize is not None and self.quantize not in get_args(Bits):
            raise ValueError(f"lora.quantize is {self.quantize!r}: choose {', '.join(get_args(Bits))} or null")
        if isinstance(self.targets, str) and self.targets != "all-linear":
            self.targets = [self.targets]
        if self.targets is not None and not self.targets:
            raise ValueError("lora.targets is empty, so nothing would be trained: name layers, or leave it out")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check_installed(self) -> None:
        """Look for the packages that it needs, before anything is built.

        Raises:
            ValueError: one is missing; says how to install it.
        """
        if importlib.util.find_spec("peft") is None:
            raise ValueError("model.lora needs peft: pip install 'lit-palm[lora]'")
        if self.quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(
                f"model.lora.quantize: {self.quantize} needs bitsandbytes: pip install bitsandbytes, or leave it out"
            )


def split_name(name: str) -> tuple[str, str] | None:
    """The role that a weight of an `AdaptedNetwork` belongs to, and its name there; None of the trunk's own.

    `trunk.layers.0.attn_out.lora_A.policy.weight` is the policy's `layers.0.attn_out.lora_A.weight`, and
    `heads.value.head.bias` the value's `head.bias`.
    """
    if found := _NAME.fullmatch(name):
        return found["role"], f"{found['layer']}.{found['part']}.{found['own']}"
    if found := _HEAD.fullmatch(name):
        return found["role"], found["own"]
    return None


def is_transposed(layer: nn.Module) -> bool:
    """Whether a linear layer keeps its matrix as [in, out], as GPT-2's do."""
    return type(layer).__name__ == "Conv1D"


def linear_layers(network: Network) -> dict[str, nn.Module]:
    """The linear layers in the blocks of a network by name; of one that has adapters already, the frozen layers."""
    inside = {id(module) for block in network.blocks() for module in block.modules()}
    return {
        name.removesuffix(".base_layer"): module
        for name, module in network.named_modules()
        if id(module) in inside and ".lora_" not in name and (isinstance(module, nn.Linear) or is_transposed(module))
    }


def targets_of(network: Network, lora: LoRA) -> list[str]:
    """The full names of the layers that get an update, in the network's order.

    Raises:
        ValueError: a target is the name of no linear layer; lists those that there are.
    """
    layers = linear_layers(network)
    wanted = usual_targets(network) if lora.targets is None else lora.targets
    if wanted == "all-linear":
        return list(layers)
    assert not isinstance(wanted, str)
    unknown = [target for target in wanted if not any(_is(name, target) for name in layers)]
    if unknown:
        raise ValueError(
            f"model.lora.targets: no linear layer is called {', '.join(unknown)} in the blocks of a "
            f"{type(network).__name__}; there are {', '.join(last_names(layers))}"
        )
    return [name for name in layers if any(_is(name, target) for target in wanted)]


def usual_targets(network: Network) -> list[str] | str:
    """What is adapted when nobody says: the network's own choice, or for a model of transformers that of peft."""
    own = network.lora_targets
    if own is not None:
        return list(own)
    architecture: Any = getattr(network.config, "architecture", None) or {}
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    found = USUAL.get(architecture.get("model_type", ""))
    return list(found) if isinstance(found, (list, set, tuple)) else "all-linear"


def last_names(names: Iterable[str]) -> list[str]:
    """The last parts of dotted names, each once."""
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _is(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def merge(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None, transposed: bool = False
) -> Tensor:
    """One matrix that does what the frozen one and its update do together.

    Args:
        weight: [out, in], or [in, out] if `transposed`.
        a: [r, in].
        b: [out, r].
        scale: what B A is multiplied by.
        magnitude: [out], of DoRA.
        transposed: see `weight`.

    Returns:
        As `weight`, in its dtype, computed in float32 or wider.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(wide).t() if transposed else weight.to(wide)
    total = total.addmm(b.to(total), a.to(total), alpha=scale)
    if magnitude is not None:
        total = total * (magnitude.to(total) / torch.linalg.norm(total, dim=1))[:, None]
    return (total.t() if transposed else total).to(weight.dtype).contiguous()
