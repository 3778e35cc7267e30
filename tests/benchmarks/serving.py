"""What serving costs and gains, as ratios: seconds on one machine say nothing about another.

    python -m tests.benchmarks.serving                   # a table on the terminal, and runs/serving.json
    python -m tests.benchmarks.serving --only server     # one part of it
    python -m tests.benchmarks.serving --short           # a tiny network, to see that everything runs

The network is the 30M preset at 256 ids in float32. Nothing here fails on a time; what a reader should find:

    engine     decode tokens a second of the scheduler over those of the cached engine,
               batches of 16 and 64 equal prompts' lengths that start and end together      at least 0.9
    offline    the same for 64 prompts of mixed completion lengths, 16 rows at most         above 1
    server     tokens a second of 16 streaming clients over those of one                    at least 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lit_palm.data.tokenizers import ByteTokenizer
from lit_palm.models import PaLM, PaLMConfig
from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.rollout.engine import CachedEngine, Engine
from lit_palm.rollout.sampling import Sampling, row_seeds
from tests.serve.load import Load, clients

TOKENIZER = ByteTokenizer()


def build(short: bool) -> PaLM:
    """The network."""
    torch.manual_seed(0)
    size = {"d_model": 32, "num_layers": 2, "num_heads": 2, "head_dim": 16} if short else {}
    return PaLMConfig.preset("30m", vocab_size=TOKENIZER.vocab_size, **size).build().eval()


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def engines(network: PaLM, rows: int, size: int | None, new: int, mixed: bool, repeats: int) -> dict[str, float]:
    """Median over pairs, run in turn, of the cached engine's seconds over the scheduler's."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 256, (64,), generator=generator) for _ in range(rows)]
    # a random network that is warm enough writes any byte: six of 263 end a completion
    sampling = Sampling(max_new_tokens=new, top_p=0.95)
    if mixed:
        sampling = Sampling(max_new_tokens=new, temperature=10.0, stop=["a", "e", "i", "o", "u", "Z"])
    written = 0

    def run(engine: Engine) -> None:
        nonlocal written
        got = engine.generate(
            network, prompts, sampling, row_seeds(0, 0, torch.arange(rows)), pad_id=TOKENIZER.pad_id, eos_id=None,
            decode=TOKENIZER.decode,
        )  # fmt: skip
        written = sum(map(len, got.completions))

    ours, peer = ContinuousEngine(size), CachedEngine(size)
    run(ours), run(peer)
    pairs = [(seconds(lambda: run(ours)), seconds(lambda: run(peer))) for _ in range(repeats)]
    best = min(a for a, _ in pairs)
    return {"tokens_per_second": written / best, "ratio": statistics.median(b / a for a, b in pairs)}


def checkpoint(network: PaLM, folder: Path) -> Path:
    """The network as a folder that `lit-palm serve` takes."""
    from safetensors.torch import save_file

    from lit_palm.modules.checkpoint import FORMAT, config_to_dict

    save_file(network.state_dict(), folder / "policy.safetensors")
    header = {
        "format": FORMAT,
        "version": "0",
        "kind": "language_model",
        "networks": {"policy": config_to_dict(network.config)},
        "tokenizer": TOKENIZER.to_dict(),
    }
    (folder / "config.json").write_text(json.dumps(header), encoding="utf-8")
    return folder


def serving(network: PaLM, count: int, duration: float, repeats: int) -> dict[str, float]:
    """Tokens a second of `count` clients and of one, in turn, against one server."""
    with tempfile.TemporaryDirectory() as name:
        folder = checkpoint(network, Path(name))
        command = [sys.executable, "-m", "lit_palm", "serve", str(folder), "--port", "0", "--model_id", "m"]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
        try:
            assert server.stderr is not None
            lines: list[str] = []
            while not (match := re.search(r"127\.0\.0\.1:(\d+)", lines[-1] if lines else "")):
                lines.append(server.stderr.readline())
                assert lines[-1], "".join(lines)
            port = int(match[1])

            def ask(number: int, time_limit: float) -> Load:
                load = asyncio.run(clients("127.0.0.1", port, "m", number, time_limit, (64, 64), minimum=True))
                assert not load.errors, load.errors[0]
                return load

            ask(count, duration / 4)
            pairs = [(ask(1, duration).rate, ask(count, duration).rate) for _ in range(repeats)]
        finally:
            server.terminate()
            server.wait(30)
    return {
        "tokens_per_second_of_one": max(a for a, _ in pairs),
        "tokens_per_second": max(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("engine", "offline", "server"), action="append")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--output", default="runs/serving.json")
    args = parser.parse_args()
    network = build(args.short)
    new, repeats, duration = (8, 1, 1.0) if args.short else (96, 5, 10.0)
    results: dict[str, Any] = {}

    def measure(part: str, name: str, work: Callable[[], dict[str, float]]) -> None:
        if args.only and part not in args.only:
            return
        results[name] = result = work()
        figures = ", ".join(f"{key.replace('_', ' ')} {value:,.0f}" for key, value in result.items() if key != "ratio")
        print(f"{name:72} {result['ratio']:5.2f}  ({figures})", flush=True)

    for rows in (16, 64):
        measure(
            "engine",
            f"scheduler over cached engine, {rows} rows that start and end together",
            lambda rows=rows: engines(network, rows, None, new, False, repeats),
        )
    measure(
        "offline",
        "scheduler over cached engine, 64 completions of mixed lengths, 16 rows",
        lambda: engines(network, 64, 16, new, True, min(repeats, 3)),
    )
    measure("server", "server, 16 streaming clients over one", lambda: serving(network, 16, duration, min(repeats, 3)))
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps({"results": results}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
