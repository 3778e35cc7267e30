"""The policy's weights handed over to an engine that samples elsewhere: whole, as safetensors in a folder.

Whatever the strategy and whatever is trained: parts are gathered, an adapter is put into the matrices that it stands
on. The first process writes; a folder appears whole, under a name that says after which step its weights were taken.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor import DTensor

from lit_palm.foreign.as_cohere import cohere_architecture, cohere_weights
from lit_palm.foreign.as_huggingface import huggingface_model
from lit_palm.foreign.network import Recipe, Weights
from lit_palm.models.adapted import View
from lit_palm.models.base import NetworkConfig
from lit_palm.models.huggingface_config import HuggingFaceConfig
from lit_palm.models.lora import is_transposed, merge, split_name
from lit_palm.models.palm import PaLMConfig
from lit_palm.models.weights import named_weights
from lit_palm.modules.shards import write_shards
from lit_palm.parallel.sharded import clean_name, copy_whole
from lit_palm.rollout.engine_base import WeightsLayout

if TYPE_CHECKING:
    from lit_palm.modules.policy import LitPolicy

__all__ = ["Handover", "whole_weights", "write_weights"]

SHARD_BYTES = 5 * 10**9
"""Of one file."""


class Handover:
    """Sees to it that an engine elsewhere has the policy's weights.

    Args:
        module: the policy with its engine.
    """

    def __init__(self, module: LitPolicy) -> None:
        self.module = module
        self._step: int | None = None
        """After which the weights that the engine has were taken; None: not known."""
        self._run = ""

    def forget(self) -> None:
        """The weights may be others than they were."""
        self._step = None

    def __call__(self) -> None:
        """Hand the weights over, unless the engine has them; by every process, between steps.

        Raises:
            ValueError: weights of this kind cannot be handed over.
            RuntimeError: the engine does not take them; on every process.
        """
        module, engine = self.module, self.module.engine
        if not engine.apart:
            return
        step = module.trainer.global_step
        if self._step == step:
            return
        layout = module.layout
        if isinstance(layout.strategy, ModelParallelStrategy) and layout.strategy.world_size > layout.size:
            raise ValueError(
                f"model.engine: {type(engine).__name__} cannot be used with tensor parallelism, whose processes would "
                "ask for the same rows apart from each other: set tensor_parallel_size to 1"
            )
        # a name of this run's own, so that nobody else's weights are taken for these
        self._run = self._run or layout.gather(uuid.uuid4().hex[:8])[0]
        version = f"{step}-{self._run}"
        weights = whole_weights(module.networks["policy"], keep=module.global_rank == 0)
        error: Exception | None = None
        try:
            write = partial(self._write, weights) if module.global_rank == 0 else None
            engine.update(version, write)
        except Exception as found:
            error = found
        layout.raise_everywhere(error)
        self._step = step

    def _write(self, weights: Mapping[str, Tensor], folder: str, layout: WeightsLayout) -> None:
        write_weights(folder, layout, self.module.network_config, weights, self.module.ready_tokenizer)


# ---------------------------------------------------------------------------------------------- whole weights


@torch.no_grad()
def whole_weights(network: nn.Module, keep: bool = True) -> Mapping[str, Tensor]:
    """The weights of a network by the names that it has alone and unspread; by every process.

    Args:
        network: as the strategy spreads it.
        keep: False helps others to put parts together, and keeps nothing.

    Raises:
        ValueError: they cannot be put together: FSDPStrategy with LoRA, or quantised matrices.
    """
    if isinstance(network, View):
        return dict(_merged(network, keep))
    if isinstance(network, FSDP):
        network = copy_whole(network)
    named = ((clean_name(name), _full(tensor)) for name, tensor in named_weights(network))
    return {name: tensor for name, tensor in named if keep}


def _full(tensor: Tensor) -> Tensor:
    # a part is gathered on its device and kept on the host, where the others wait for it
    return tensor.detach() if not isinstance(tensor, DTensor) else cast(DTensor, tensor.detach()).full_tensor().cpu()


def _merged(view: View, keep: bool) -> Iterator[tuple[str, Tensor]]:
    shared, role = view.adapted, view.role
    assert role is not None
    if isinstance(view.shared, FSDP):
        raise ValueError(
            "model.engine samples elsewhere, and under FSDPStrategy adapters cannot be put into the weights that it "
            "is to have: use ModelParallelStrategy (configs/strategy/fsdp.yaml)"
        )
    lora = shared.adapters[role]
    for raw, tensor in named_weights(shared.trunk):
        name = clean_name(raw)
        if split_name(f"trunk.{name}") is not None:
            continue
        path, _, own = raw.rpartition(".")
        layer: Any = shared.trunk.get_submodule(path.removesuffix(".base_layer"))
        name = name.replace(".base_layer.", ".")
        if own != "weight" or not path.endswith(".base_layer") or role not in layer.lora_A:
            yield name, _full(tensor)
            continue
        if not tensor.is_floating_point():
            raise ValueError(
                "model.engine samples elsewhere, and quantised matrices cannot be handed over to it: leave "
                "model.lora.quantize out, or use a built-in engine"
            )
        a, b = _full(layer.lora_A[role].weight), _full(layer.lora_B[role].weight)
        magnitude = _full(layer.lora_magnitude_vector[role].weight) if lora.dora else None
        whole = _full(tensor)
        if keep:
            transposed = is_transposed(layer.get_base_layer())
            yield name, merge(whole, a, b, lora.scale, magnitude, transposed).cpu()


# ---------------------------------------------------------------------------------------------- on disk


def write_weights(
    folder: str, layout: WeightsLayout, config: NetworkConfig, weights: Mapping[str, Tensor], tokenizer: Any
) -> None:
    """A folder with a network's weights; it appears whole.

    Args:
        folder: does not exist, or is replaced.
        layout: `lit-palm`: safetensors of the weights by their names; `huggingface`: also config.json, as transformers,
            vLLM and SGLang read them.
        config: of the network.
        weights: by name.
        tokenizer: gives the special ids.

    Raises:
        ValueError: the network has no counterpart in transformers, or the folder cannot be written.
    """
    new = f"{os.path.dirname(folder)}/.{os.path.basename(folder)}.tmp"
    try:
        shutil.rmtree(new, ignore_errors=True)
        os.makedirs(new)
    except OSError as error:
        raise ValueError(f"{folder}: weights for the engine cannot be written there ({error.strerror})") from error
    try:
        if layout == "lit-palm":
            recipes = {k: Recipe(tuple(v.shape), v.dtype, partial(weights.__getitem__, k)) for k, v in weights.items()}
            write_shards(new, Weights(recipes), SHARD_BYTES)
        else:
            _as_transformers(new, config, weights, tokenizer)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _as_transformers(folder: str, config: NetworkConfig, weights: Mapping[str, Tensor], tokenizer: Any) -> None:
    if isinstance(config, HuggingFaceConfig):
        model, _ = huggingface_model(config, weights, tokenizer, None, "the policy")
        model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    elif isinstance(config, PaLMConfig):
        dtype = weights["embedding.weight"].dtype
        architecture = cohere_architecture(config, tokenizer, dtype, "the policy")
        write_shards(folder, cohere_weights(config, weights, "", dtype), SHARD_BYTES)
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
            json.dump(architecture, file, indent=2)
    else:
        raise ValueError(
            f"model.engine: a {type(config).__name__} has no counterpart in transformers, whose layout this "
            "engine reads: use RemoteEngine with server: lit-palm, or a built-in engine"
        )
