"""Any causal language model of `transformers` as a `Network`: the same interface as PaLM to everything that runs one.

    network: meta-llama/Llama-3.2-1B                # in YAML: a hub name or a folder, read by `lit_palm.foreign`
    HuggingFaceConfig(architecture={"model_type": "llama", "hidden_size": 64, ...}).build()      # from nothing

`lm` is the model of `transformers`; of it the base model runs, and our heads read its hidden states, so that no one
makes a batch x length x vocabulary tensor. A tied output weight is the embedding's and exists once. Everything a model
needs beside its weights is in `architecture`, as plain data, so that a checkpoint stands alone.

Dropout is off unless asked for, whatever the model's own configuration says: with it no first ratio is 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_palm.models.base import Cache, Head, Network
from lit_palm.models.huggingface_cache import HuggingFaceCache
from lit_palm.models.huggingface_config import HuggingFaceConfig, read_architecture
from lit_palm.models.layers import QuickLinear

__all__ = ["HuggingFaceConfig", "HuggingFaceNetwork"]


class HuggingFaceNetwork(Network):
    """The network; see the module's docstring and `Network.forward`.

    Raises:
        ValueError: no vocabulary size, or an output layer that is more than one matrix.
    """

    config: HuggingFaceConfig
    loads_in_parts = True

    def __init__(self, config: HuggingFaceConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("HuggingFaceConfig.vocab_size is not set: give it, or build through a module")
        self.config = config
        self.lm: Any = _make(config)
        QuickLinear.take_over(self.lm)
        base, output = self.lm.base_model, self.lm.get_output_embeddings()
        if base is self.lm or not isinstance(output, nn.Linear) or output.bias is not None:
            raise ValueError(
                f"the architecture {self.lm.config.model_type!r} is not supported: its output layer is "
                f"{'more than one matrix without bias' if output is not None else 'missing'}"
            )
        own = self.lm.config.get_text_config(decoder=True)
        self.tied: bool = bool(getattr(own, "tie_word_embeddings", False))
        """The output weight is the embedding's."""
        if self.tied:  # one parameter of one name: a second reference would part from it when weights are spread
            self.lm.set_output_embeddings(nn.Identity())
        scale = float(getattr(own, "logit_scale", None) or 1.0)  # Cohere
        self.logit_scale: float = scale / float(getattr(own, "logits_scaling", None) or 1.0)  # Granite
        self._base_takes: frozenset[str] = frozenset(inspect.signature(base.forward).parameters)
        self._attention_chosen: bool = config.attention != "auto"
        if config.activation_checkpointing:
            enable = getattr(self.lm, "activation_checkpointing_enable", None) or self.lm.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # the name of this argument has changed

    def _apply(self, fn: Any, recurse: bool = True) -> HuggingFaceNetwork:
        """Constants (rotary frequencies) move with the network, but are never emptied nor rounded to 16 bits."""
        constants = [
            (module, name, module._buffers[name])
            for module in self.modules()
            for name in module._non_persistent_buffers_set
            if isinstance(module._buffers.get(name), Tensor)
        ]
        super()._apply(fn, recurse)
        for module, name, kept in constants:
            moved = module._buffers[name]
            assert kept is not None and moved is not None
            module._buffers[name] = kept.to(moved.device)
        return self

    def drop_output(self) -> list[str]:
        """See `Network.drop_output`; from then on the embedding stands in for the output weight."""
        if self.tied:
            return []
        weight = self.lm.get_output_embeddings().weight
        names = [name for name, parameter in self.named_parameters() if parameter is weight]
        self.lm.set_output_embeddings(nn.Identity())
        self.tied = True
        return names

    @property
    def output_weight(self) -> Tensor:
        """[V, D], the embedding's where they are tied."""
        layer = self.lm.get_input_embeddings() if self.tied else self.lm.get_output_embeddings()
        weight: Tensor = layer.weight
        return weight

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, in order: instances of the classes that the model says must not be split."""
        whole = set(self.lm._no_split_modules or ())
        found = [module for module in self.lm.modules() if type(module).__name__ in whole]
        inner = {id(child) for module in found for child in module.modules() if child is not module}
        found = [module for module in found if id(module) not in inner and module is not self.lm.base_model]
        if not found:  # a model that does not say: the list that is as long as it has layers
            lists = [m for m in self.lm.modules() if isinstance(m, nn.ModuleList) and len(m) == self.config.num_layers]
            found = list(lists[0]) if lists else []
        return found

    def new_cache(self, num_rows: int, length: int) -> HuggingFaceCache:
        """An empty cache, the model's own, which grows as it is filled."""
        return HuggingFaceCache()

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        head: Head | None = None,
    ) -> Any:
        """Logits [B, T, V] or what `head` returns; see `Network.forward`.

        Raises:
            ValueError: more tokens than `max_length`.
        """
        assert cache is None or isinstance(cache, HuggingFaceCache), "decodes with the cache of its own new_cache"
        assert cache is None or documents is None, "packed documents are for training, the cache is for decoding"
        past = cache.length if cache is not None else 0
        if documents is None and past + tokens.shape[1] > self.config.max_length + (cache.padding if cache else 0):
            raise ValueError(
                f"{past + tokens.shape[1]} tokens are more than max_length ({self.config.max_length}): shorten the rows"
            )
        self._choose_attention(tokens.device)
        if documents is not None:
            hidden = self._of_documents(tokens, documents)
        else:
            hidden = self._of_rows(tokens, mask, positions, cache)
        if head is not None:
            return head(hidden, self.output_weight, self.logit_scale)
        return F.linear(hidden * self.logit_scale, self.output_weight)

    def _of_rows(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: HuggingFaceCache | None
    ) -> Tensor:
        """Hidden states [B, T, D] of rows that are one document each."""
        options: dict[str, Any] = {"use_cache": False}
        width, past = tokens.shape[1], 0
        if cache is not None:
            past = cache.length
            options = {"use_cache": True, "past_key_values": cache.inner}
            mask = cache.extend(tokens, mask)
        if mask is not None:
            counted = mask.long().cumsum(1) - 1
            options["attention_mask"] = mask.long()
            positions = counted[:, -width:].clamp(min=0) if positions is None else positions
        elif positions is None:
            positions = torch.arange(past, past + width, device=tokens.device)[None]
        if "position_ids" in self._base_takes:
            options["position_ids"] = positions.clamp(min=0)
        hidden: Tensor = self.lm.base_model(input_ids=tokens, **options).last_hidden_state
        if cache is not None:
            cache.length += width
        return hidden

    def _of_documents(self, tokens: Tensor, documents: Tensor) -> Tensor:
        """Hidden states [B, T, D] of packed rows, each document run as a row of its own.

        Whatever an architecture does with positions, biases and windows, documents then cannot see each other.
        """
        rows, width = tokens.shape
        starts = torch.ones_like(documents, dtype=torch.bool)
        starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
        which = starts.flatten().cumsum(0) - 1  # [B * T], the document of each token, counted through
        first = starts.flatten().nonzero().squeeze(1)
        place = torch.arange(rows * width, device=tokens.device) - first[which]
        lengths = torch.diff(first, append=first.new_tensor([rows * width]))
        apart = tokens.new_zeros(len(first), int(lengths.max()))
        apart[which, place] = tokens.flatten()
        if apart.shape[1] > self.config.max_length:
            raise ValueError(
                f"a document has {apart.shape[1]} tokens, more than max_length ({self.config.max_length}): shorten it"
            )
        return self._of_rows(apart, None, None, None)[which, place].view(rows, width, -1)

    def _choose_attention(self, device: torch.device) -> None:
        """Once it is known where and in which precision the network runs."""
        if self._attention_chosen:
            return
        self._attention_chosen = True
        from transformers.utils import is_flash_attn_2_available

        sixteen_bits = self.output_weight.dtype.itemsize == 2 or torch.is_autocast_enabled(device.type)
        flash = getattr(self.lm, "_supports_flash_attn", False) and sixteen_bits
        if flash and device != torch.Generator().device and is_flash_attn_2_available():
            self.lm.set_attn_implementation("flash_attention_2")


def _make(config: HuggingFaceConfig) -> Any:
    """The model of `transformers`; on the meta device only its parameters are, and what it computes is real."""
    from transformers import AutoModelForCausalLM

    own = read_architecture(config.architecture, config.code)
    for part in {id(c): c for c in (own, own.get_text_config(decoder=True))}.values():
        part.use_cache = True
        part.vocab_size = config.vocab_size
        for key, value in vars(part).items():
            if "drop" in key and isinstance(value, float | int) and not isinstance(value, bool):
                setattr(part, key, 0.0 if "layer" in key else config.dropout)
    options: dict[str, Any] = {"trust_remote_code": config.code is not None}
    if config.attention != "auto":
        options["attn_implementation"] = config.attention
    try:
        if torch.get_default_device().type != "meta":
            return AutoModelForCausalLM.from_config(own, **options)
        with _parameters_without_memory():
            return AutoModelForCausalLM.from_config(own, **options)
    except (ImportError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"the architecture {own.model_type!r} cannot be built here: {why}") from error


@contextmanager
def _parameters_without_memory() -> Iterator[None]:
    """Parameters on the meta device, each as soon as its module takes it; buffers and other tensors on the host."""
    register = nn.Module.register_parameter

    def onto_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = onto_meta  # type: ignore[method-assign,assignment]
    try:
        with torch.device(torch.Generator().device):
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
