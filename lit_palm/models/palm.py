"""PaLM (Chowdhery et al. 2022), top to bottom: configuration, block, network; `layers` has its small parts.

Every block is y = x + Attention(norm(x)) + SwiGLU(norm(x)): attention and feed-forward read the same bias-free
LayerNorm, so that one matrix multiplication makes queries, keys, values and both halves of the feed-forward. All query
heads share one key/value head unless `num_kv_heads` says otherwise, positions are rotary, the output weight is the
embedding's and logits are scaled by 1/sqrt(d_model).

    network = PaLMConfig(vocab_size=256).build()
    logits_BTV = network(tokens_BT)

    cache = network.new_cache(num_rows=B, length=128)          # incremental decoding
    logits_BTV = network(prompt_BT, mask=mask_BT, cache=cache)  # prompts are left-padded
    logits_B1V = network(next_B1, cache=cache)

Shapes follow the legend of `lit_palm.types`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from lit_palm.models.attention import Documents, attend_within, bias_of, find_documents
from lit_palm.models.base import Cache, Head, Network, NetworkConfig
from lit_palm.models.cache import PaLMCache
from lit_palm.models.flex import Packed, attend_blocks, find_blocks, takes_blocks
from lit_palm.models.half import attention, linear
from lit_palm.models.kernels import recomputed, split_swiglu
from lit_palm.models.layers import Linear, Norm, QKNorm, rotate
from lit_palm.models.side_by_side import Seen, Sequences, collect, put, spread
from lit_palm.models.weights import Fresh, fill, fresh_seed, give_memory
from lit_palm.types import has_float64

__all__ = ["PaLM", "PaLMCache", "PaLMConfig"]


@dataclass
class PaLMConfig(NetworkConfig):
    """A PaLM as plain data; `PaLMConfig.preset("8b")` and its like give the paper's sizes (its table 1)."""

    API_VERSION: ClassVar[int] = 1
    CHANGEABLE: ClassVar[frozenset[str]] = frozenset({"dropout", "activation_checkpointing", "max_length", "attention"})

    vocab_size: int | None = None
    """Number of token ids; None takes it from the tokeniser."""
    d_model: int = 512
    """Width of the hidden states."""
    num_layers: int = 8
    """Number of blocks."""
    num_heads: int = 8
    """Number of query heads."""
    head_dim: int = 64
    """Width of one head; even, because RoPE rotates pairs."""
    num_kv_heads: int = 1
    """Key/value heads: 1 is multi-query (the paper), `num_heads` is multi-head, a divisor in between is grouped."""
    d_ffn: int | None = None
    """Inner width of the feed-forward; None is 4 * d_model."""
    max_length: int = 2048
    """Longest sequence in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths (Su et al. 2021)."""
    xpos: bool = False
    """Let attention decay with distance (xPos, Sun et al. 2022)."""
    xpos_scale_base: int = 512
    """Distance in tokens over which xPos decays by its base factor."""
    qk_norm: Literal["none", "l2", "layer"] = "none"
    """Normalise queries and keys: "l2" to unit length times a weight shared by the heads, "layer" by a LayerNorm over
    each head with a weight of its own (Dehghani et al. 2023)."""
    norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""
    logit_scale: float | None = None
    """Factor on the logits; None is 1 / sqrt(d_model)."""
    dropout: float = 0.0
    """Dropped share of attention weights and of each block's output, while training; the paper fine-tunes with 0.1."""
    activation_checkpointing: bool = False
    """Keep only block inputs for the backward pass and recompute the rest: less memory for about a third more time."""
    attention: Packed = "auto"
    """How packed documents attend within themselves: "flex" by FlexAttention, "sdpa" without it, "auto" by it where the
    device can and there is no dropout."""

    def __post_init__(self) -> None:
        for name in ("d_model", "num_layers", "num_heads", "head_dim", "num_kv_heads", "max_length", "xpos_scale_base"):
            if getattr(self, name) < 1:
                raise ValueError(f"PaLMConfig.{name} is {getattr(self, name)}: set it to at least 1")
        for name in ("vocab_size", "d_ffn"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"PaLMConfig.{name} is {getattr(self, name)}: set it to at least 1, or leave it out")
        if self.head_dim % 2:
            raise ValueError(f"PaLMConfig.head_dim is {self.head_dim}: make it even, RoPE rotates pairs")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"PaLMConfig.num_kv_heads is {self.num_kv_heads}: choose a divisor of num_heads ({self.num_heads})"
            )
        if self.qk_norm not in ("none", "l2", "layer"):
            raise ValueError(f'PaLMConfig.qk_norm is {self.qk_norm!r}: choose "none", "l2" or "layer"')
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"PaLMConfig.dropout is {self.dropout}: choose a share from 0 up to, not including, 1")
        if self.attention not in get_args(Packed):
            raise ValueError(f"PaLMConfig.attention is {self.attention!r}: choose {', '.join(get_args(Packed))}")
        if self.attention == "flex" and self.dropout:
            raise ValueError("PaLMConfig.attention is 'flex', which knows no dropout: choose auto, or no dropout")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> PaLMConfig:
        """A named size, with fields replaced by `overrides`.

        Raises:
            ValueError: no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"no PaLM preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    def build(self) -> PaLM:
        """Make the network with freshly initialised weights; see `NetworkConfig.build`."""
        return PaLM(self)


_PAPER = {"head_dim": 256, "vocab_size": 256_000, "max_length": 2048}
PRESETS: dict[str, dict[str, Any]] = {
    "1m": {"d_model": 128, "num_layers": 4, "num_heads": 4, "head_dim": 32},
    "30m": {"d_model": 512, "num_layers": 8, "num_heads": 8, "head_dim": 64},
    "8b": {"d_model": 4096, "num_layers": 32, "num_heads": 16, **_PAPER},
    "62b": {"d_model": 8192, "num_layers": 64, "num_heads": 32, **_PAPER},
    "540b": {"d_model": 18432, "num_layers": 118, "num_heads": 48, **_PAPER},
}
"""Names for `PaLMConfig.preset`; the two smallest fit a laptop, the others are the paper's."""


class Block(nn.Module):
    """One parallel block: x + Attention(norm(x)) + SwiGLU(norm(x)) (the paper's section 2)."""

    keep: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = staticmethod(lambda function: function)
    """Binds what is recomputed in the backward pass to the adapter that is active now (`lit_palm.models.adapted`)."""
    compiled: Callable[..., Tensor] | None = None
    """`compute` for any block, compiled; used unless the block decodes (`lit_palm.models.compiled`)."""
    spare = False
    """Recompute the feed-forward's inner values in the backward pass: below adapters memory is what counts."""

    def __init__(self, config: PaLMConfig, index: int) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        d_ffn = config.d_ffn or 4 * config.d_model
        self.index, self.dropout, self.xpos = index, config.dropout, config.xpos
        self.num_heads, self.num_kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.sizes = ((heads + kv_heads) * head_dim, kv_heads * head_dim, d_ffn, d_ffn)  # q and k, v, gate, up
        self.recompute = config.activation_checkpointing
        self.norm = Norm(config.d_model, config.norm_eps)
        self.attn_ffn_in = Linear(config.d_model, sum(self.sizes))
        self.attn_out = Linear(heads * head_dim, config.d_model)
        self.ffn_out = Linear(d_ffn, config.d_model)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            self.q_norm = QKNorm(config.qk_norm, heads, head_dim, config.norm_eps)
            self.k_norm = QKNorm(config.qk_norm, kv_heads, head_dim, config.norm_eps)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, ...], bias: Seen, cache: PaLMCache | None) -> Tensor:
        """[B, T, D] -> [B, T, D]; `rope` and `bias` come from `PaLM.forward`; the cache takes the keys and values."""
        compute = self.compute if self.compiled is None or cache is not None else partial(self.compiled, self)
        # recomputed in here rather than around the block: a sharded block is then gathered once for both
        if self.recompute and self.training and torch.is_grad_enabled():
            result: Tensor = checkpoint(self.keep(compute), x_BTD, rope, bias, cache, use_reentrant=False)
            return result
        return compute(x_BTD, rope, bias, cache)

    def compute(self, x_BTD: Tensor, rope: tuple[Tensor, ...], bias: Seen, cache: PaLMCache | None) -> Tensor:
        """What `forward` gives."""
        if isinstance(bias, Sequences) and bias.read is not None:
            result = self.compute_read(x_BTD, rope, bias, bias.read)
            return self.compute(x_BTD, rope, bias.whole(), cache)[:, : bias.read] if result is None else result
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        qk, v, hidden = self.project(self.norm(x_BTD))
        q, k = self.queries_and_keys(qk.view(heads), rope)
        return self.add(x_BTD, self.attend(q, k, v.view(heads), bias, cache), hidden)

    def compute_read(self, x_BTD: Tensor, rope: tuple[Tensor, ...], sequences: Sequences, read: int) -> Tensor | None:
        """The last block's results for the tokens that are read, of which the others are but keys and values.

        None where the layer that makes them is not to be cut: it is spread, or has an adapter whose product is peft's.
        """
        x, rest = x_BTD.split((read, x_BTD.shape[1] - read), 1)
        first = self.num_heads * self.head_dim
        width = self.num_kv_heads * self.head_dim
        part = getattr(getattr(self, "attn_ffn_in", None), "part", None)
        kv = None if part is None else part(self.norm(rest), slice(first, first + 2 * width))
        if kv is None:
            return None
        qk, v, hidden = self.project(self.norm(x))
        q, k = self.queries_and_keys(qk.view(1, read, -1, self.head_dim), tuple(t[:, :read] for t in rope))
        more = kv.view(1, rest.shape[1], 2, self.num_kv_heads, self.head_dim).unbind(2)
        normed = more[0] if self.k_norm is None else self.k_norm(more[0])
        k = torch.cat((k, *rotate(normed, [t[:, read:] for t in rope[-2:]])), 1)
        v = torch.cat((v.view(1, read, -1, self.head_dim), more[1]), 1)
        return self.add(x, self.attend(q, k, v, sequences, None), hidden)

    def add(self, x_BTD: Tensor, attended: Tensor, hidden: Tensor) -> Tensor:
        """The block's output from its input and both halves."""
        out = self.join(attended, hidden)
        if self.training and self.dropout:
            out = F.dropout(out, self.dropout)
        return x_BTD + out

    def project(self, x_BTD: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys [B, T, (H+K) * Dh], values [B, T, K * Dh], and the feed-forward's inner values."""
        qk, v, hidden = split_swiglu(self.attn_ffn_in(x_BTD), self.sizes)
        if qk.stride(-1) != 1:  # thin_linear's layout, which suits the feed-forward but not attention
            qk, v = qk.contiguous(), v.contiguous()
        return qk, v, hidden

    def join(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """[B, T, D] from both halves."""
        if self.spare and not self.recompute and not torch.compiler.is_compiling():
            with recomputed(hidden):
                return self.attn_out(attended) + self.ffn_out(hidden)
        return self.attn_out(attended) + self.ffn_out(hidden)

    def queries_and_keys(self, qk: Tensor, rope: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Split [B, T, H+K, Dh], normalise and rotate; one pass over both when they are treated alike."""
        if self.q_norm is None and not self.xpos:
            q, k = rotate(qk, rope, (self.num_heads, self.num_kv_heads))
            return q, k
        q, k = qk.split((self.num_heads, self.num_kv_heads), 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        (q,), (k,) = rotate(q, rope[:2]), rotate(k, rope[-2:])
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Seen, cache: PaLMCache | None) -> Tensor:
        """Attention of q [B, T, H, Dh] over k and v [B, T, K, Dh], with the cache's before them: [B, T, H * Dh]."""
        dropout = self.dropout if self.training else 0.0
        if isinstance(bias, Documents):
            return attend_within(q, k, v, bias, dropout).flatten(2)
        if isinstance(bias, BlockMask):
            return attend_blocks(q, k, v, bias).flatten(2)
        if isinstance(bias, Sequences):
            home = bias.home[: q.shape[1]]
            rows = self.attend(put(q, home, bias), spread(k, bias), spread(v, bias), None, None)
            return collect(rows, home)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(self.index, k, v)
            if q.shape[1] == 1:
                # one query a row sees every slot: queries that share a key/value head become the rows of one small
                # matrix product, and keys and values are read once
                q = q.reshape(len(q), self.num_kv_heads, -1, self.head_dim)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).reshape(len(q), 1, -1)
        grouped = self.num_kv_heads != self.num_heads
        if grouped and bias is not None and not q.is_cpu:
            # the GPU kernels that take a bias want a key/value head for each query head
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for t in (k, v))
            grouped = False
        out = attention(
            q.transpose(1, 2),
            k,
            v,
            bias,
            dropout_p=dropout,
            is_causal=bias is None,
            enable_gqa=grouped,
        )
        return out.transpose(1, 2).flatten(2)


class PaLM(Network):
    """The network; see the module's docstring and `Network.forward`.

    Raises:
        ValueError: `config.vocab_size` is not set.
    """

    config: PaLMConfig
    takes_sequences = True
    in_parts = True
    lora_targets = ("attn_ffn_in", "attn_out", "ffn_out")

    def __init__(self, config: PaLMConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("PaLMConfig.vocab_size is not set: give it, or build through a module with a tokeniser")
        self.config = config
        self.logit_scale = config.d_model**-0.5 if config.logit_scale is None else config.logit_scale
        device = torch.get_default_device()
        with torch.device("meta"):  # weights are drawn once, by init_weights
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
            self.norm = Norm(config.d_model, config.norm_eps)
        self._tables: tuple[Tensor, ...] = ()
        give_memory(self, device)
        self.init_weights()

    def init_weights(self, seed: int | None = None) -> None:
        """All initialisation (the paper's section 5): embedding N(0, 1), kernels N(0, 1/fan_in), norms 1.

        Args:
            seed: the same one gives the same weights; None draws one from torch's generator.
        """
        seed = fresh_seed() if seed is None else seed
        fill(self, Fresh(self, seed))
        self._tables = ()

    def initial_std(self, name: str) -> float | None:
        module = self.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear):
            return float(module.in_features**-0.5)
        return 1.0 if isinstance(module, nn.Embedding) else None

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks, in order."""
        return list(self.layers)

    def new_cache(self, num_rows: int, length: int) -> PaLMCache:
        """An empty cache; it takes device and dtype from the first tokens."""
        return PaLMCache(length)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        sequences: Sequences | None = None,
        cache: Cache | None = None,
        head: Head | None = None,
    ) -> Any:
        """Logits [B, T, V] or what `head` returns; see `Network.forward`.

        Raises:
            ValueError: more tokens than `max_length`.
        """
        assert cache is None or isinstance(cache, PaLMCache), "a PaLM decodes with the cache of its own new_cache"
        assert cache is None or documents is None, "packed documents are for training, the cache is for decoding"
        past = cache.length if cache is not None else 0
        width = tokens.shape[1] if sequences is None else sequences.place.shape[1]
        if past + width > self.config.max_length:
            raise ValueError(
                f"{past + width} tokens are more than max_length ({self.config.max_length}): shorten the "
                "rows, or build the network with a larger max_length"
            )
        weight = self.embedding.weight
        if isinstance(weight, DTensor):  # each process of a tensor-parallel group keeps some of the rows
            weight = weight.redistribute(placements=[Replicate() for _ in weight.placements]).to_local()
        x = F.embedding(tokens, weight)
        if cache is not None:
            cache.reserve(tokens.shape[1])
            if mask is not None:
                cache.pad(mask, x.dtype)
        rope = self.rope(tokens, mask, positions, cache)
        bias = sequences if sequences is not None else self.attention_bias(x, mask, documents, cache)
        seen = bias.whole() if isinstance(bias, Sequences) else bias
        for block in self.layers:
            x = block(x, rope, bias if block is self.layers[-1] else seen, cache)
        if cache is not None:
            cache.length += tokens.shape[1]
        hidden = self.norm(x)
        if head is not None:
            return head(hidden, weight, self.logit_scale)
        return linear(hidden * self.logit_scale, weight)

    def rope(
        self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None, cache: PaLMCache | None
    ) -> tuple[Tensor, ...]:
        """Rows of the rotary tables for these tokens, each [(B,) T, 1, Dh]; counts positions when none are given."""
        tables = self.rotary_tables(tokens.device)
        start, width = cache.length if cache is not None else 0, tokens.shape[1]
        counted = None
        if cache is not None and cache.next_position is not None:
            first = cache.next_position[:, None]
            if mask is not None:
                counted = first + mask.cumsum(1) - 1
            else:
                counted = first if width == 1 else first + torch.arange(width, device=tokens.device)
            cache.next_position = counted[:, -1] + 1
        elif mask is not None:
            counted = mask.cumsum(1) - 1
        if positions is None:
            positions = counted
        if positions is None:
            return tuple(table[start : start + width] for table in tables)
        positions = positions.clamp(min=0)  # left padding comes before position 0 and is never read
        return tuple(table[positions] for table in tables)

    def rotary_tables(self, device: torch.device) -> tuple[Tensor, ...]:
        """cos and sin [max_length, 1, Dh] of every position, for queries and keys; with xPos two pairs.

        They are not buffers, because casting the network to bfloat16 would cast them with it. The angles are those of
        RoFormer's equation 15, the decay that of xPos' equation 13 with its origin in the middle of `max_length`
        (only differences of positions matter).
        """
        wide = self.norm.weight.dtype == torch.float64
        if not self._tables or self._tables[0].device != device or (self._tables[0].dtype == torch.float64) != wide:
            config, half = self.config, self.config.head_dim // 2
            # not as inference tensors, even when validation comes before training; on the host where a device
            # has no float64
            with torch.inference_mode(False), torch.no_grad():
                options: dict[str, Any] = {"dtype": torch.float64, "device": device if has_float64(device) else None}
                place = torch.arange(config.max_length, **options)[:, None]
                pair = torch.arange(half, **options) / half
                angle = place * config.rope_theta**-pair
                cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
                pairs = [cos, sin]
                if config.xpos:
                    decay = (pair + 0.4) / 1.4
                    scale = decay ** ((place - config.max_length // 2) / config.xpos_scale_base)
                    scale = torch.cat((scale, scale), -1)
                    pairs = [cos * scale, sin * scale, cos / scale, sin / scale]
                dtype = torch.float64 if wide else torch.float32
                self._tables = tuple(table[:, None].to(dtype).to(device) for table in pairs)
        return self._tables

    def attention_bias(self, x: Tensor, mask: Tensor | None, documents: Tensor | None, cache: PaLMCache | None) -> Seen:
        """What is added to attention scores, [B, 1, T, S]; None for plain causal attention; where documents lie."""
        if documents is not None and mask is None:
            config, block = self.config, cast(Block, self.layers[0])
            heads = (block.num_heads, block.num_kv_heads, config.head_dim)
            if not config.dropout and takes_blocks(config.attention, documents, x, *heads):
                return find_blocks(documents)
            # what is compiled is so for any length, not for these
            if block.compiled is None and (found := find_documents(documents)):
                return found
        width, past = x.shape[1], cache.length if cache is not None else 0
        kept = None if cache is None else cache.bias_of(past + width)
        if cache is not None and width == 1:
            return None if kept is None else kept[:, None, None]
        if mask is None and documents is None and past == 0:
            return None
        return bias_of(x, past, mask, documents, kept)
