"""The peers' networks of one shape, as their own documentation trains and samples them."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.inputs import Size, dtype_of, token_ids
from tests.benchmarks.memory import Peak
from tests.benchmarks.worker import Work


def llama(size: Size, **changes: Any) -> Any:
    """transformers' Llama: tied embeddings, one key/value head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": size.vocab_size,
        "hidden_size": size.d_model,
        "intermediate_size": 4 * size.d_model,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": 1,
        "head_dim": size.head_dim,
        "tie_word_embeddings": True,
        "max_position_embeddings": size.max_length,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))


def palm(size: Size) -> nn.Module:
    """palm-rlhf-pytorch's PaLM."""
    from palm_rlhf_pytorch import PaLM

    torch.manual_seed(0)
    network: nn.Module = PaLM(
        dim=size.d_model, num_tokens=size.vocab_size, depth=size.num_layers, heads=size.num_heads,
        dim_head=size.head_dim, flash_attn=True, cross_entropy_ignore_index=-100,
    )  # fmt: skip
    return network


def litgpt(size: Size) -> Any:
    """litgpt's GPT with PaLM's block: parallel, one norm, no bias, tied embeddings."""
    from litgpt import GPT, Config

    torch.manual_seed(0)
    network = GPT(
        Config(
            block_size=size.max_length, vocab_size=size.vocab_size, padded_vocab_size=size.vocab_size,
            n_layer=size.num_layers, n_head=size.num_heads, n_embd=size.d_model, n_query_groups=1,
            head_size=size.head_dim, rotary_percentage=1.0, parallel_residual=True, shared_attention_norm=True,
            bias=False, norm_class_name="LayerNorm", mlp_class_name="LLaMAMLP", intermediate_size=4 * size.d_model,
        )
    )  # fmt: skip
    network.lm_head.weight = network.transformer.wte.weight
    return network


def losses(peer: str, network: Any) -> Callable[[Tensor], Tensor]:
    """The mean cross-entropy of a batch of ids."""
    if peer == "transformers":
        return lambda ids: network(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]
    if peer == "palm-rlhf-pytorch":
        return lambda ids: network(ids, return_loss=True)  # type: ignore[no-any-return]
    return lambda ids: F.cross_entropy(network(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


BUILD: dict[str, Callable[[Size], Any]] = {"transformers": llama, "palm-rlhf-pytorch": palm, "litgpt": litgpt}


def train(peer: str, size: dict[str, int], rows: int, length: int, precision: str) -> Work:
    """A full step: forward, loss, backward, AdamW. transformers' Trainer would take the fused AdamW, so it has it here.

    `bf16-mixed` is autocast over float32 weights, `bf16-true` weights and optimiser in bfloat16.
    """
    shape = Size(**size)
    network = BUILD[peer](shape).to(dtype_of(precision)).train()
    loss = losses(peer, network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=peer == "transformers")
    device = next(network.parameters()).device.type
    count = 0

    def run() -> dict[str, Any]:
        nonlocal count
        count += 1
        ids = token_ids(count, rows, length)
        mixed = precision == "bf16-mixed"
        with torch.autocast(device, torch.bfloat16) if mixed else contextlib.nullcontext():
            value = loss(ids)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"tokens": rows * length}

    return run


def train_memory(size: dict[str, int], rows: int, length: int, steps: int = 2) -> Work:
    """Peak bytes of transformers' steps above what the imports took."""
    import transformers.models.llama.modeling_llama  # noqa: F401  # its own import is no memory of the step

    peak = Peak()

    def run() -> dict[str, Any]:
        step = train("transformers", size, rows, length, "32-true")
        for _ in range(steps):
            step()
        return {"cost": peak.bytes()}

    return run


@torch.no_grad()
def _litgpt_sample(network: Any, prompts: Tensor, new: int) -> Tensor:
    network.clear_kv_cache()
    network.max_seq_length = prompts.shape[1] + new
    network.set_kv_cache(len(prompts), dtype=next(network.parameters()).dtype)
    positions, ids, out = torch.arange(prompts.shape[1]), prompts, []
    for _ in range(new):
        logits = network(ids, positions)[:, -1]
        ids = torch.multinomial(logits.float().softmax(-1), 1)
        out.append(ids)
        positions = positions[-1:] + 1
    return torch.cat(out, 1)


def generate(
    peer: str, size: dict[str, int], rows: int, prompt: int, new: int, precision: str, cache: str = "dynamic",
    completions: int = 1,
) -> Work:  # fmt: skip
    """New tokens at temperature 1, no filter, no end.

    Args:
        peer: which network.
        size: its shape.
        rows: prompts.
        prompt: ids of a prompt.
        new: ids of a completion.
        precision: `32-true` or `bf16-true`.
        cache: of transformers: `dynamic`, or `static` (without its own compilation, as on a CPU by default).
        completions: of each prompt (transformers' `num_return_sequences`).
    """
    network = BUILD[peer](Size(**size)).to(dtype_of(precision)).eval()
    prompts = token_ids(0, rows, prompt)

    def run() -> dict[str, Any]:
        if peer == "litgpt":
            made = _litgpt_sample(network, prompts, new).shape[1]
        elif peer == "palm-rlhf-pytorch":
            with torch.no_grad():
                made = network.generate(prompt + new, prompt=prompts, temperature=1.0).shape[1]
        else:
            made = (
                network.generate(
                    input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True, temperature=1.0,
                    top_k=0, max_new_tokens=new, min_new_tokens=new, num_return_sequences=completions,
                    cache_implementation=cache,
                ).shape[1]
                - prompt
            )  # fmt: skip
        assert made == new, f"{made} new tokens for {new}"
        return {"tokens": rows * completions * new}

    return run


def generate_sampled(peer: str, size: dict[str, int], rows: int, prompt: int, new: int, places: int) -> Work:
    """The cost of `generate` of a peer without a cache, from single tokens at some lengths between its first and last.

    Each token reads the whole text again, so that its cost is a smooth function of the length; the mean over evenly
    spaced lengths times the number of tokens is the cost of all.
    """
    network = BUILD[peer](Size(**size)).eval()
    lengths = [prompt + round((i + 0.5) / places * new) for i in range(places)]

    def run() -> dict[str, Any]:
        costs = []
        with torch.no_grad():
            for length in lengths:
                ids = token_ids(length, rows, length)
                start = time.perf_counter()
                network.generate(length + 1, prompt=ids, temperature=1.0)
                costs.append(time.perf_counter() - start)
        return {"cost": statistics.mean(costs) * new, "tokens": rows * new, "places": places}

    return run
