"""Bytes that a PaLM's forward and backward pass hold, read off the autograd graph of `lit_palm/models/palm.py`.

Symbols: n tokens of a micro-batch, B rows of T tokens, D width, F width of a block's fused input product, I inner
width of its feed-forward, H heads and K key/value heads of width Q; r, c bytes of a residual and of a product's input.
A block keeps for its backward pass

    x       n D r           the residual, which LayerNorm keeps (with mean and deviation, 2 n r)
    h       n D c           the normed input, which the fused product keeps
    fused   n F c           which SwiGLU keeps (it recomputes silu); values are a view of it
    q, k    n (H+K) Q c     rotated, which attention keeps
    lse     n H 4           the log of attention's normalisers (flash attention)
    out     n H Q c         what attention gives, kept by it and by the product that follows
    hidden  n I c           which the last product keeps

Under autocast each product also keeps its weight's cast, and attention its mask's. With activation checkpointing a
block keeps x alone. `tests/plan/test_activations.py` compares these figures with what autograd really saves.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_palm.plan.job import NetworkShape, Precision

__all__ = ["Block", "Head", "block_bytes", "head_bytes", "network_bytes"]

MAX_LOGITS = 2**24
"""`TokenLogProbs.max_elements`."""


@dataclass(frozen=True)
class Block:
    """Bytes of one block for n tokens; `cast` is kept by autocast's casts of weights."""

    residual: float
    inner: float
    hidden: float
    attention: float
    cast: float
    forward: float
    """Most that a forward pass without gradients holds beside its input."""
    forward_end: float
    """What a forward pass with gradients holds beside what is kept, at its end."""
    fused_grad: float
    qkv_grad: float

    @property
    def saved(self) -> float:
        """What is kept beside x."""
        return self.inner + self.cast


def block_bytes(
    shape: NetworkShape,
    precision: Precision,
    rows: int,
    length: int,
    *,
    tensor: int = 1,
    masked: bool = False,
    cpu: bool = False,
    casts_weights: bool = False,
) -> Block:
    """Bytes of a block.

    Args:
        shape: the network.
        precision: r and c.
        rows: B.
        length: T.
        tensor: devices that split its matrices: heads and the feed-forward's inner width are divided.
        masked: attention is given a mask.
        cpu: CPU kernels (attention with dropout keeps its probabilities, dropout keeps scaled masks).
        casts_weights: products keep casts of their weights.
    """
    c, r, config = precision.compute, precision.residual, shape.config
    n, d, q = rows * length, config.d_model, config.head_dim
    heads = config.num_heads / tensor
    kv = max(1, config.num_kv_heads / tensor)
    inner_width = shape.d_ffn / tensor
    fused = (heads + 2 * kv) * q + 2 * inner_width
    qk, out, hidden = n * (heads + kv) * q * c, n * heads * q * c, n * inner_width * c
    kept = n * d * c + n * fused * c + qk + out + hidden + 2 * n * r + 4 * n * heads
    if config.qk_norm != "none":  # the split copies q and k, and the norm's result is kept for its weight
        kept += 2 * qk
    if precision.autocast and r < 4 and not cpu:
        kept += n * d * 4  # autocast gives LayerNorm a float32 copy of x
    scores = 0.0
    if masked and precision.autocast:
        scores = rows * length * length * c  # each block casts the mask anew
    if config.dropout:
        kept += n * d * (c if cpu else 1)
        if cpu:  # no flash attention: q, k and v for every head, and probabilities three times
            kept += n * heads * q * c * 2 - 4 * n * heads + 3 * rows * heads * length * length * c
    kept += scores
    cast = 2.0 * sum(shape.block_matrices) / tensor if casts_weights else 0.0
    # RoPE: a product and its sum in float32, and the rolled half
    rotating = n * (heads + kv) * q * (max(4, c) * 2 + c)
    ends = 3 * n * d * c
    forward = max(
        n * (d + fused) * c, n * fused * c + hidden + max(rotating, qk + out + ends) + (n * d * r if c != r else 0)
    )
    return Block(
        residual=n * d * r,
        inner=kept,
        hidden=hidden,
        attention=qk + out + 4 * n * heads,
        cast=cast,
        forward=forward + scores + max(0, (2.0 * max(shape.block_matrices) / tensor if precision.autocast else 0)),
        forward_end=ends,
        fused_grad=n * fused * c,
        qkv_grad=n * (heads + 2 * kv) * q * c,
    )


def network_bytes(shape: NetworkShape, precision: Precision, rows: int, length: int, masked: bool = False) -> float:
    """Bytes kept once for all blocks: token ids, RoPE's tables, the mask [B, 1, T, T], the last norm's statistics."""
    n, config = rows * length, shape.config
    pairs = 4 if config.xpos else 2
    tables = pairs * config.max_length * config.head_dim * 4
    if masked:  # positions pick rows of the tables for every token
        tables += pairs * n * config.head_dim * 4 + rows * length * length * precision.residual
    return tables + 8 * n + 2 * n * precision.residual


@dataclass(frozen=True)
class Head:
    """Bytes of `TokenLogProbs` for N selected tokens."""

    saved: float
    """Selected hidden states, indices, and log-probabilities over the vocabulary when they fit one chunk."""
    cast: float
    """The output weight's cast under autocast."""
    forward: float
    """Most that its forward pass holds beside what is saved."""
    backward: float
    """Most that its backward pass holds beside what is saved, before there is a gradient of the output weight."""
    backward_again: float
    """The same for the second chunk and later ones."""
    hidden_grad: float
    wide: float
    """The gradient of the output weight while chunks are added up."""
    product: float
    """Temporaries of that gradient where it is summed in another type than it is multiplied in."""

    @property
    def alone(self) -> float:
        """Most that a pass without gradients holds."""
        return self.saved + self.cast + self.forward


def head_bytes(
    shape: NetworkShape,
    precision: Precision,
    tokens: int,
    targets: int,
    *,
    entropy: bool = False,
    entropy_grad: bool = False,
    casts_weights: bool = False,
) -> Head:
    """Bytes of the head that gives log-probabilities of `targets` of `tokens` hidden states.

    Logits come in chunks of 2^24 elements. A forward pass holds a chunk's logits (type c, and widened to float32 where
    that differs) beside its log-softmax (float32), then one more for entropies; a backward pass holds the
    log-probabilities and the gradient of the logits, in float32 and once more in c.
    """
    c, d, v = precision.compute, shape.config.d_model, shape.vocab
    chunk = max(1, MAX_LOGITS // v)
    one = min(targets, chunk) * v * 4.0
    kept = one if targets <= chunk else 0.0
    logits = one * c / 4 + (one if c < 4 else 0)
    forward = max(logits, one if entropy else 0) + one - kept
    gradient = one * c / 4 if c < 4 else 0.0
    if kept:
        backward = one * (2 if entropy_grad else 1) + gradient
    else:
        backward = max(logits + one, 2 * one, one + gradient)
    low = 1.0 if c < 4 else 0.0
    return Head(
        saved=targets * d * c + kept + 32.0 * targets,
        cast=2.0 * shape.embedding if casts_weights else 0.0,
        forward=forward + targets * d * c,
        backward=backward,
        backward_again=backward if not kept else 0.0,
        hidden_grad=targets * d * c + tokens * d * precision.residual,
        wide=4.0 * shape.embedding,
        product=2.0 * shape.embedding * low,
    )
