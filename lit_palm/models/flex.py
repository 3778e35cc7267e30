"""FlexAttention (Dong et al. 2024): attention within the documents of packed rows by blocks of tokens, on accelerators.

A mask over whole rows is a number for each pair of tokens, [B, T, T], which every layer reads, and with it pairs of
different documents are computed and thrown away. Here a table of B x (T / 128)^2 says which blocks of 128 tokens share
a document; only those pairs are computed, and within a pair `documents` is asked who sees whom. The table is made once
for a batch, the kernel is compiled once for a process, in the first steps.

Whether a device can do that is found out by doing it: `why_not` compares the compiled kernel, forwards and backwards,
with the mask. On the host torch has no backward pass for it, and documents are cut out (`lit_palm.models.attention`).
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from lit_palm.models.attention import bias_of
from lit_palm.models.half import attention, product_type
from lit_palm.models.hardware import is_host

__all__ = ["Packed", "attend_blocks", "find_blocks", "takes_blocks", "why_not"]

Packed = Literal["auto", "sdpa", "flex"]

BLOCK = 128
"""Tokens of a block, which suits the kernels; rows of a single one are masked."""

BACKEND = "inductor"

AGREES = {torch.float64: 1e-6, torch.float32: 1e-2}
"""By how much results may differ from those under the mask, as a share of the largest; of 16-bit types 0.05. Products
of float32 numbers may be those of 10-bit mantissas (`torch.set_float32_matmul_precision`)."""


def find_blocks(documents: Tensor) -> BlockMask:
    """The table of packed rows, made where they are without waiting for it.

    Right for any documents. Few blocks are computed where they lie one after the other in the order of their numbers,
    padding (below 0) last.

    Args:
        documents: [B, T] long.

    Returns:
        [B, 1, T, T], by blocks.
    """
    documents = documents.contiguous()  # the kernel's graph is one for strides too
    rows, width = documents.shape
    count = -(-width // BLOCK)
    last = torch.iinfo(documents.dtype).max
    number = documents.where(documents >= 0, last - 1)
    # what fills the last block is like nothing else, so that it is never seen as a whole
    number = torch.nn.functional.pad(number, (0, count * BLOCK - width), value=last).view(rows, count, BLOCK)
    low, high = number.amin(2), number.amax(2)
    earlier = torch.ones(count, count, dtype=torch.bool, device=documents.device).tril()
    touches = (low[:, None, :] <= high[:, :, None]) & (low[:, :, None] <= high[:, None, :]) & earlier
    alike = low == high
    whole = touches & alike[:, :, None] & alike[:, None, :] & earlier.tril(-1)

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    tables = (*_listed(touches & ~whole), *_listed(whole))
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(width, width))


def _listed(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, N] bool -> how many blocks each block sees [B, 1, N], and which, these first [B, 1, N, N]."""
    which = pairs.int().argsort(dim=2, descending=True, stable=True)
    return pairs.sum(2, dtype=torch.int32)[:, None], which.int()[:, None].contiguous()


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    """Causal attention of each token over its own document.

    Args:
        q: [B, T, H, Dh].
        k: [B, T, K, Dh], K a divisor of H.
        v: [B, T, K, Dh].
        blocks: of these rows.

    Returns:
        [B, T, H, Dh], in the type that torch multiplies in.
    """
    dtype, grouped = product_type(q), k.shape[2] != q.shape[2]
    # a graph around it takes it in
    attend = _attend if torch.compiler.is_compiling() else _compiled(BACKEND)
    q, k, v = (t.transpose(1, 2).to(dtype) for t in (q, k, v))
    out: Tensor = attend(q, k, v, blocks, grouped)
    return out.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, grouped: bool) -> Any:
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=grouped)


@cache
def _compiled(backend: str) -> Any:
    return torch.compile(_attend, backend=backend)


def takes_blocks(setting: Packed, documents: Tensor, like: Tensor, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether attention within documents goes by blocks.

    Args:
        setting: of the network; `auto` takes blocks on an accelerator that can, and warns where it cannot.
        documents: [B, T] long.
        like: of the type and on the device of the network's hidden states.
        heads: of the queries, on this device.
        kv_heads: of keys and values.
        head_dim: width of a head.

    Raises:
        ValueError: `flex` where that is not possible.
    """
    device, real = documents.device, type(documents) is Tensor and not documents.is_meta
    if setting == "sdpa" or not real or (setting == "auto" and is_host(device)) or documents.shape[1] <= BLOCK:
        return False
    reason = why_not(device, product_type(like), heads, kv_heads, head_dim)
    if reason is not None and setting == "flex":
        raise ValueError(f"attention: flex is not possible on {device}: {reason}; leave it at auto")
    return reason is None


@cache
def why_not(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> str | None:
    """Why a device cannot attend by blocks; None: it can, and gives what the mask gives.

    The first time this compiles the kernel for two short rows, and warns, off the host, where it cannot be used.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            off = _difference(device, dtype, heads, kv_heads, head_dim)
        limit = AGREES.get(dtype, 0.05)
        reason = None if off <= limit else f"results are off by {off:.2g} of the largest, more than {limit}"
    except Exception as error:  # whatever is missing: a compiler, memory on the chip, the kernel itself
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}"
    if reason is not None and not is_host(device):
        warnings.warn(
            f"FlexAttention is not used on {device}, packed documents are masked instead ({reason})", stacklevel=2
        )
    return reason


def _difference(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> float:
    """Between results and gradients by blocks and those under the mask: the largest, as a share of the largest."""
    width = 2 * BLOCK + BLOCK // 2
    place = torch.arange(width, device=device)
    documents = torch.stack((torch.bucketize(place, place.new_tensor([3, BLOCK + 5])), place // width))
    documents[0, -7:] = -1
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(2, width, n, head_dim, generator=generator) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, weights = (t.to(device, dtype) for t in drawn)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    # a graph of its own: sizes that change from here to the run would make the run's graph one for any size
    attend = torch.compile(lambda *args, **options: flex_attention(*args, **options), backend=BACKEND)
    options = {"block_mask": find_blocks(documents), "enable_gqa": True}
    found = attend(*(t.transpose(1, 2) for t in inputs), **options).transpose(1, 2)
    bias = bias_of(q, 0, None, documents, None)
    keys, values = (t.repeat_interleave(heads // kv_heads, 2).transpose(1, 2) for t in (k, v))
    expected = attention(q.transpose(1, 2), keys, values, bias).transpose(1, 2)
    results = [(y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)) for y in (found, expected)]
    return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True)]).max())
