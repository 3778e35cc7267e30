"""The form in which a network decodes: one token a row, with its weights as the machine reads them quickest.

    decode = decoding_form(network, Decoding(num_tokens=200))   # with the weights of now
    logits_BV = decode(tokens_B1, positions=positions_B1, cache=cache, head=last_logits)

It is called like the network and gives what that gives, within rounding. A step is bound by reading every weight once
and by the number of operations, so that a whole PaLM is run as few operations on plain tensors: no modules, one product
for queries, keys, values and feed-forward, one for the output of both halves with the residual added to it, matrices
packed for the processor where enough tokens will be decoded to pay for it. Prompts go to the network itself, save where
packed matrices serve them as well: packing them again takes as long as multiplying some 64 tokens.

An adapter is put into the copies that packing or converting makes of the matrices, so that it costs nothing there.

Any other network (of Hugging Face, with adapters where no copies are made, quantised, spread over processes) decodes as
it is. Which form is taken depends on the processor, types, shapes and settings, never on timing: a run can be repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_palm.models.adapted import View
from lit_palm.models.base import Cache, Head, Network
from lit_palm.models.cache import PaLMCache
from lit_palm.models.decoding_native import NativeStep, WholeStep
from lit_palm.models.decoding_prompts import read_prompts
from lit_palm.models.decoding_step import Layer, Shape, add_halves, base_of, base_weight, compiled_run, run
from lit_palm.models.hardware import multiplies
from lit_palm.models.kernels import last_logits
from lit_palm.models.layers import Linear
from lit_palm.models.matrices import Matrix, PanelMatrix, Weights
from lit_palm.models.palm import Block, PaLM
from lit_palm.models.products import native

__all__ = ["Decode", "Decoding", "Weights", "bytes_read_of", "decoding_form"]

Decode = Callable[..., Any]
"""Called like `Network.forward`."""

FEWEST_TOKENS = 16
"""Tokens of a row from which packing the weights, which takes as long as a few steps, is made up for."""


@dataclass(frozen=True)
class Decoding:
    """How a network is to decode."""

    weights: Weights | None = None
    """Type of the weights while decoding; None: that of the network, or of autocast."""
    compile: bool = False
    """Compile the step with `torch.compile`."""
    num_tokens: int | None = None
    """Most tokens a row; None: no end is known."""

    @property
    def packs(self) -> bool:
        """Whether packing the weights pays; what is compiled sees through products of torch's own only."""
        return not self.compile and (self.num_tokens is None or self.num_tokens >= FEWEST_TOKENS)


def decoding_form(network: Network, how: Decoding) -> Decode:
    """What to call instead of a network, to decode with the weights that it has now.

    Args:
        network: in evaluation mode; it must not change while the form is in use.
        how: settings.

    Raises:
        ValueError: the settings ask for what this network cannot be given, or for a package or compiler that is not
            installed.
    """
    trunk, role = _trunk(network)
    unmerged = trunk is not None and role is not None and not _copies(trunk, how)
    if trunk is None or unmerged:
        cure = " (lora.merge_to_sample)" if trunk is not None and trunk.norm.weight.dtype is torch.float32 else ""
        for name, value in (("weights", how.weights), ("compile", how.compile)):
            if value:
                raise ValueError(
                    f"engine.{name} is {value}, which is for a PaLM that is whole on every process, its adapters "
                    f"merged{cure}; this is a {type(network).__name__} that is not: leave {name} out"
                )
        return network
    weights = how.weights
    if weights is None and _autocasts(trunk):
        if _product_type(trunk, how) is not torch.bfloat16 or trunk.norm.weight.dtype is not torch.float32:
            return network
        weights = "bf16"
    return _PaLMDecoder(network, trunk, how, weights, role)


def _autocasts(trunk: PaLM) -> bool:
    return torch.is_autocast_enabled(trunk.norm.weight.device.type)


def _product_type(trunk: PaLM, how: Decoding) -> torch.dtype:
    """What matrices are multiplied in; of weights of 8 bits what they are made from."""
    own = trunk.norm.weight
    if how.weights == "bf16":
        return torch.bfloat16
    return torch.get_autocast_dtype(own.device.type) if how.weights is None and _autocasts(trunk) else own.dtype


def _copies(trunk: PaLM, how: Decoding) -> bool:
    """Whether decoding makes copies of float32 matrices anyway, which an adapter can be put into."""
    own = trunk.norm.weight
    packed = how.packs and own.is_cpu and native(_product_type(trunk, how))
    return own.dtype is torch.float32 and (how.weights is not None or packed)


def bytes_read_of(decode: Decode) -> Callable[[int], int]:
    """Rows of a step -> bytes of the weights that it reads, which decoding is bound by.

    Many rows are multiplied with a wider copy of narrow weights on some processors.
    """
    if isinstance(decode, _PaLMDecoder):
        return decode.bytes_read
    assert isinstance(decode, nn.Module)  # a wrapper of a strategy's may stand for the network
    total = sum(p.numel() * p.element_size() for p in decode.parameters())
    return lambda rows: total


def _trunk(network: Network) -> tuple[PaLM | None, str | None]:
    """The PaLM that computes what a network does, if its weights are ordinary tensors and nobody listens in.

    With the role of an adapter that is not in its matrices.
    """
    trunk: nn.Module = network
    role = None
    if isinstance(network, View):
        trunk, merged = network.adapted.trunk, network.adapted.merged_role
        role = network.role if merged is None else None
        if network.shared is not network.adapted or merged not in (None, network.role):
            return None, None
    if type(trunk) is not PaLM or any(_heard(module) for module in trunk.modules()):
        return None, None
    layers = [layer for b in trunk.layers for layer in (b.attn_ffn_in, b.attn_out, b.ffn_out)]
    bases = [base_of(layer) for layer in layers]
    if any(type(layer) is not Linear or layer.bias is not None for layer in bases):
        return None, None
    weights = [*(layer.weight for layer in bases), trunk.embedding.weight, trunk.norm.weight]
    if any(type(w) is not nn.Parameter or w.dtype != weights[0].dtype or w.is_meta for w in weights):
        return None, None
    return trunk, role


def _heard(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)


class _PaLMDecoder:
    """A PaLM's decoding step; see the module's docstring."""

    def __init__(self, network: Network, trunk: PaLM, how: Decoding, weights: Weights | None, role: str | None) -> None:
        self.network, self.trunk = network, trunk
        own, block = trunk.norm.weight, cast(Block, trunk.layers[0])
        self.shape = Shape(block.sizes, block.num_heads, block.num_kv_heads, block.head_dim, block.xpos)
        self.compile = how.compile
        # between products activations are as wide as weights that were converted came in
        wide = torch.promote_types(own.dtype, torch.float32)
        self.dtype = own.dtype if weights is None and multiplies(own, own.dtype) else wide
        pack = how.packs
        whole = base_weight if role is None else partial(cast(View, network).adapted.whole, role=role)
        self.layers = [Layer(block, weights, pack, self.dtype, whole) for block in trunk.layers]
        if self.compile:
            compiled_run()
            for matrix in (m for layer in self.layers for m in (layer.entry, *layer.exit)):
                matrix.settle()
        plain = block.q_norm is None and not block.xpos and own.is_cpu and not self.compile
        heads = block.num_heads, block.num_kv_heads, block.head_dim, block.sizes[-1]
        self.native = NativeStep.of(self.dtype, *heads) if plain else None
        self.norm = own.to(self.dtype)
        self.counted: dict[int, int] = {}
        (self.output,) = Matrix.of([trunk.embedding.weight], None if weights == "int8" else weights, pack)
        self.matrices = [self.output, *(m for layer in self.layers for m in (layer.entry, *layer.exit))]
        packed = [matrix.panels for matrix in self.matrices if isinstance(matrix, PanelMatrix)]
        all_packed = len(packed) == len(self.matrices)
        # weights that were converted on request are for completions alone
        self.reads = how.weights is None and all_packed
        self.whole: WholeStep | None = None
        if self.native is not None and all_packed and WholeStep.can(len(own), self.dtype, packed[1:]):
            norms = [layer.norm for layer in self.layers]
            blocks = list(zip(norms, packed[1::2], packed[2::2], strict=True))
            self.whole = WholeStep(self.native, blocks, self.norm, trunk.norm.eps)

    def __call__(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Cache | None = None,
        head: Head | None = None,
    ) -> Any:
        """See `Network.forward`."""
        prompt = tokens.shape[1] != 1 or mask is not None or cache is None or not cache.length
        past = 0 if cache is None else cache.length
        fits = past + tokens.shape[1] <= self.trunk.config.max_length
        if prompt and not (self.reads and cache is not None and head is last_logits and fits):
            return self.network(tokens, mask=mask, positions=positions, cache=cache, head=head)
        assert isinstance(cache, PaLMCache), "a PaLM decodes with the cache of its own new_cache"
        kind = tokens.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            hidden = self.read(tokens, mask, positions, cache) if prompt else self.step(tokens, positions, cache)
            if head is last_logits:
                logits = self.output(hidden * self.trunk.logit_scale)
                return logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
            weight = self.trunk.embedding.weight.to(self.dtype)
            if head is None:
                return F.linear(hidden[:, None] * self.trunk.logit_scale, weight)
            return head(hidden[:, None], weight, self.trunk.logit_scale)

    def bytes_read(self, rows: int) -> int:
        """See `bytes_read_of`."""
        if rows not in self.counted:
            self.counted[rows] = sum(matrix.num_bytes(rows) for matrix in self.matrices)
        return self.counted[rows]

    def read(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: PaLMCache) -> Tensor:
        """Hidden states [B, D] after the last of tokens [B, T], of which `mask` [B, T] is False at left padding."""
        trunk = self.trunk
        x = read_prompts(trunk, self.shape, self.layers, tokens, mask, positions, cache, self.dtype)
        return F.layer_norm(x, x.shape[1:], self.norm, None, trunk.norm.eps)

    def step(self, tokens: Tensor, positions: Tensor | None, cache: PaLMCache) -> Tensor:
        """Hidden states [B, D] after tokens [B, 1]."""
        trunk, blocks = self.trunk, compiled_run() if self.compile else run
        cache.cast(self.dtype)
        cache.reserve(1)
        rope = [table.view(-1, 1, self.shape.head_dim) for table in trunk.rope(tokens, None, positions, cache)]
        bias = cache.bias_of(cache.length + 1)
        x = F.embedding(tokens[:, 0], trunk.embedding.weight).to(self.dtype)
        start, place = cache.start, cache.start + cache.length
        if self.whole is not None:
            x = self.whole(x, rope, bias, cache.layers, start, place)
            cache.length += 1
            return x
        if self.native is not None:
            between = self.native.begin(x, rope, bias, start, place)
            for layer, slots in zip(self.layers, cache.layers, strict=True):
                normed = F.layer_norm(x, x.shape[1:], layer.norm, None, layer.eps)
                x = add_halves(layer, between(layer.entry(normed), *slots), x)
        else:
            bias = None if bias is None else bias[:, None, None]
            x = blocks(self.shape, self.layers, x, rope, bias, cache.layers, start, place)
        cache.length += 1
        return F.layer_norm(x, x.shape[1:], self.norm, None, trunk.norm.eps)
