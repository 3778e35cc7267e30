"""Speed and memory beside peers, in one run, as ratios: seconds on one machine say nothing about another.

    python -m tests.benchmarks.speed                       # a table on the terminal, and runs/speed.json
    python -m tests.benchmarks.speed --only generation     # one part of it
    python -m tests.benchmarks.speed --short               # a tiny network, to see that everything runs

The shape is that of palm-rlhf-pytorch's own example: d 512, 8 layers, 8 heads of 64, one key/value head, 256 ids,
float32, about 30M parameters. Ours and the peer run in turn, again and again; a ratio is the median over those pairs,
so that whatever else the machine does hits both. Peers that are not installed are left out.

What is measured, and the bound it is held to when somebody reads the table (nothing here fails on a time):

    training     tokens a second of a full step at 4 x 512 tokens        at least that of transformers' Llama
    generation   192 new tokens from a prompt of 64, at batch 1 and 16   at least 1.2 times transformers' generate
    position     seconds a token near position 1500 over near 100        at most 1.3
    memory       peak bytes of an update at 32k ids over those at 1k     under 1.3
                 (without the embedding, its gradient and its optimiser state)
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_palm.models import PaLM, PaLMConfig, TokenLogProbs
from lit_palm.models.kernels import last_logits
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.sampling import Sampling, row_seeds


@dataclass
class Shape:
    """Sizes of one run; the defaults are the ones that figures are quoted for."""

    d_model: int = 512
    num_layers: int = 8
    num_heads: int = 8
    vocab_size: int = 256
    train_rows: int = 4
    train_length: int = 512
    prompt_length: int = 64
    new_tokens: int = 192
    near: int = 100
    far: int = 1500
    vocab_sizes: tuple[int, int] = (1024, 32 * 1024)
    repeats: int = 7


SHORT = Shape(32, 2, 2, 64, 2, 16, 4, 6, 4, 20, (64, 256), 1)


def build(shape: Shape, vocab_size: int | None = None) -> PaLM:
    """Our network of this shape."""
    torch.manual_seed(0)
    return PaLMConfig(
        vocab_size=vocab_size or shape.vocab_size,
        d_model=shape.d_model,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        head_dim=shape.d_model // shape.num_heads,
        max_length=max(2048, shape.far),
    ).build()


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(ours: Callable[[], object], peer: Callable[[], object], repeats: int) -> dict[str, float]:
    """Best seconds of each after a warm-up, and the median of peer / ours over pairs (above 1: ours is faster)."""
    ours(), peer()
    pairs = [(seconds(ours), seconds(peer)) for _ in range(repeats)]
    return {
        "seconds": min(a for a, _ in pairs),
        "peer_seconds": min(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


# ---------------------------------------------------------------- peers


def llama(shape: Shape, **changes: Any) -> Any:
    """transformers' Llama of equal size: tied embeddings, one key/value head; None where it is not installed."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return None
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "intermediate_size": 4 * shape.d_model,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": 1,
        "head_dim": shape.d_model // shape.num_heads,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))


def palm_rlhf(shape: Shape) -> torch.nn.Module | None:
    """palm-rlhf-pytorch's PaLM of equal size."""
    try:
        from palm_rlhf_pytorch import PaLM as Peer
    except ImportError:
        return None
    torch.manual_seed(0)
    return Peer(
        dim=shape.d_model,
        num_tokens=shape.vocab_size,
        depth=shape.num_layers,
        heads=shape.num_heads,
        dim_head=shape.d_model // shape.num_heads,
        flash_attn=True,
        cross_entropy_ignore_index=-100,
    )


# ---------------------------------------------------------------- what is measured


def training(shape: Shape) -> dict[str, Any]:
    """A full step: forward, loss, backward, AdamW."""

    def step(network: torch.nn.Module, loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

        def run() -> None:
            loss(torch.randint(1, shape.vocab_size, (shape.train_rows, shape.train_length))).backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    network = build(shape)
    ours = step(network, lambda x: -network(x, head=TokenLogProbs(x))["logps"].sum() / x[:, 1:].numel())
    tokens = shape.train_rows * shape.train_length
    results: dict[str, Any] = {}
    if (peer := llama(shape)) is not None:
        theirs = step(peer, lambda x: peer(input_ids=x, labels=x).loss)
        results["training, transformers' Llama"] = in_turn(ours, theirs, shape.repeats)
    if (other := palm_rlhf(shape)) is not None:
        theirs = step(other, lambda x: other(x, return_loss=True))
        results["training, palm-rlhf-pytorch"] = in_turn(ours, theirs, shape.repeats)
    for result in results.values():
        result["tokens_per_second"] = tokens / result["seconds"]
    return results


def generation(shape: Shape) -> dict[str, Any]:
    """New tokens at batch 1 and 16, temperature 1, no filter, no end-of-sequence id."""
    network, peer, results = build(shape), llama(shape), {}
    for rows in (1, 16):
        prompts = torch.randint(1, shape.vocab_size, (rows, shape.prompt_length))
        sampling, seeds = Sampling(max_new_tokens=shape.new_tokens), row_seeds(0, 0, torch.arange(rows))

        def ours(prompts: Tensor = prompts, sampling: Sampling = sampling, seeds: Tensor = seeds) -> None:
            CachedEngine().generate(network, list(prompts), sampling, seeds, pad_id=0, eos_id=None)

        def theirs(prompts: Tensor = prompts) -> None:
            new = shape.new_tokens
            options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": new}
            mask = torch.ones_like(prompts)
            peer.eval().generate(input_ids=prompts, attention_mask=mask, min_new_tokens=new, **options)  # type: ignore

        if peer is None:
            continue
        result = in_turn(ours, theirs, shape.repeats)
        result["tokens_per_second"] = rows * shape.new_tokens / result["seconds"]
        results[f"generation at batch {rows}, transformers' Llama"] = result
    return results


@torch.no_grad()
def position(shape: Shape) -> dict[str, Any]:
    """Seconds of one decoding step of one row near a late position over near an early one."""
    network = build(shape).eval()
    steps = max(2, min(40, shape.near // 2))

    def stretch(start: int) -> Callable[[], None]:
        def run() -> None:
            cache.length = start  # the same slots again and again
            for _ in range(steps):
                network(token, cache=cache, head=last_logits)

        cache = network.new_cache(1, start + steps)
        network(torch.randint(1, shape.vocab_size, (1, start)), cache=cache, head=last_logits)
        token = torch.ones(1, 1, dtype=torch.long)
        return run

    result = in_turn(stretch(shape.near), stretch(shape.far), 3 * shape.repeats)
    return {f"seconds a token at position {shape.far} over {shape.near}": result}


def update_bytes(shape: Shape, vocab_size: int) -> int:
    """Peak bytes of PPO-like updates in this process, above what the imports took, without the embedding's share."""
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    network = build(shape, vocab_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    for _ in range(2):  # the second has the optimiser's state
        tokens = torch.randint(1, vocab_size, (shape.train_rows, shape.train_length))
        out = network(tokens, head=TokenLogProbs(tokens, entropy=True))
        ratio = (out["logps"] - out["logps"].detach()).exp()
        (-ratio.clamp(0.8, 1.2).sum() - 0.01 * out["entropy"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    unit = 1 if sys.platform == "darwin" else 1024
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kib) * unit
    # weight, gradient and two moments; at least 1, since a tiny network drowns in rounding to pages
    return max(1, used - 4 * network.embedding.weight.numel() * network.embedding.weight.element_size())


def memory(shape: Shape) -> dict[str, Any]:
    """Peak of an update at the larger vocabulary over at the smaller, each in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.speed", *(["--short"] if shape == SHORT else []), "--update-of"]
    small, large = (
        int(subprocess.run([*command, str(v)], check=True, capture_output=True, text=True).stdout)
        for v in shape.vocab_sizes
    )
    name = f"peak bytes of an update at {shape.vocab_sizes[1]} ids over {shape.vocab_sizes[0]}"
    return {name: {"small": small, "large": large, "ratio": large / small}}


PARTS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "training": training,
    "generation": generation,
    "position": position,
    "memory": memory,
}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Speed and memory beside peers, as ratios.")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure only this part (may be repeated)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--short", action="store_true", help="a tiny network, to see that everything runs")
    parser.add_argument("--output", type=Path, default=Path("runs/speed.json"), help="where the figures go")
    parser.add_argument("--update-of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = SHORT if args.short else Shape()
    if args.update_of:
        print(update_bytes(shape, args.update_of))
        return
    results: dict[str, Any] = {}
    for part in args.only or PARTS:
        for name, result in PARTS[part](shape).items():
            results[name] = result
            rate = f"  {result['tokens_per_second']:9.1f} tokens/s" if "tokens_per_second" in result else ""
            print(f"{name:55s} {result['ratio']:6.2f}{rate}", flush=True)
    figures = {"torch": torch.__version__, "threads": args.threads, "shape": asdict(shape), "results": results}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
