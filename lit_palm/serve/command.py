"""`lit-palm serve CHECKPOINT`: an OpenAI-compatible server.

lit-palm serve runs/demo/ppo/last.ckpt --port 8000 --api_key secret
curl http://127.0.0.1:8000/v1/chat/completions -H "Authorization: Bearer secret" -H "Content-Type: application/json" \\
    -d '{"model": "ppo", "messages": [{"role": "user", "content": "The film"}]}'
"""

from __future__ import annotations

import os
import re
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lit_palm.models.matrices import Weights

__all__ = ["main", "model_name"]


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="lit-palm serve",
        description="Serve a checkpoint to clients of OpenAI's interface.",
        exit_on_error=False,
    )
    add = parser.add_argument
    add("checkpoint", type=str, help="A checkpoint with a language model or policy, or a Hugging Face folder.")
    add("--host", type=str, default="127.0.0.1", help="Where to listen; the default is this machine alone.")
    add("--port", type=int, default=8000, help="Where to listen; 0 takes any free port.")
    add("--model_id", type=str | None, help="The model's name for clients; by default from the checkpoint's path.")
    add("--api_key", type=str | None, help="What clients must bring; else the environment's LIT_PALM_API_KEY, if any.")
    add("--max_batch_size", type=int, default=64, help="Most completions at once.")
    add("--max_queue", type=int, default=256, help="Most completions that wait; more are refused with 429.")
    add("--max_slots", type=int | None, help="Most slots of the KV cache, rows times the longest; None: no limit.")
    add("--max_tokens", type=int | None, help="Most new tokens of a request; None: what the context leaves.")
    add("--max_body", type=int, default=1_000_000, help="Most bytes of a request's body; more are refused with 413.")
    add("--weights", type=Weights | None, help="Type of a PaLM's weights while it decodes.")
    add("--compile", type=bool, default=False, help="Decode with torch.compile.")
    add("--drain_seconds", type=float, default=10.0, help="How long streams may go on after SIGTERM or ctrl-c.")
    return parser


def model_name(path: str) -> str:
    """A name from a checkpoint's path: that of its folder where the file's own says nothing."""
    place = Path(re.sub(r"^\w+://", "", path.rstrip("/")))
    name = place.stem if place.suffix in (".ckpt", ".gguf", ".pt", ".safetensors") else place.name
    if name in ("last", "best", "final", "model", "") and place.parent.name:
        return place.parent.name
    return name or "model"


def main(argv: Sequence[str]) -> int:
    """Run `lit-palm serve`."""
    try:
        args = _parser().parse_args(list(argv))
    except ArgumentError as error:
        raise ValueError(str(error)) from error
    for name, least in (("max_batch_size", 1), ("max_queue", 0), ("max_body", 1), ("drain_seconds", 0)):
        if args[name] < least:
            raise ValueError(f"--{name} is {args[name]}: use at least {least}")
    if not 0 <= args.port <= 65535:  # a larger one would be taken for what is left of it by 65536
        raise ValueError(f"--port is {args.port}: use 1 to 65535, or 0 for any that is free")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise ValueError(f"--max_tokens is {args.max_tokens}: use at least 1, or leave it out")
    api_key = args.api_key if args.api_key is not None else os.environ.get("LIT_PALM_API_KEY") or None
    if api_key == "":
        raise ValueError("--api_key is empty: give a key, or leave it out")
    try:
        import litserve  # noqa: F401
    except ImportError as error:
        raise ValueError(f"lit-palm serve needs LitServe ({error}): pip install 'lit-palm[serve]'") from error
    # newer versions of FastAPI can export traces of every request; what is said here stays here
    os.environ["FASTAPI_OTEL_AUTO_CONFIGURE"] = "false"
    os.environ["OTEL_SDK_DISABLED"] = "true"
    from lit_palm.models.base import Network
    from lit_palm.models.decoding import Decoding
    from lit_palm.modules.checkpoint import load_checkpoint_tokenizer, read_config
    from lit_palm.modules.weights import blueprint, load_network
    from lit_palm.rollout.continuous import Scheduler
    from lit_palm.serve.routes import Limits, OpenAIRoutes
    from lit_palm.serve.server import PalmServer
    from lit_palm.serve.worker import Worker

    # what can be wrong with the checkpoint shows before the port is taken
    tokenizer, config = load_checkpoint_tokenizer(args.checkpoint), read_config(args.checkpoint)
    blueprint(args.checkpoint)
    encoder = type(tokenizer).from_dict(tokenizer.to_dict())

    def load() -> Scheduler:
        network = load_network(args.checkpoint)
        assert isinstance(network, Network)
        device = torch.accelerator.current_accelerator()
        if device is not None:
            network.to(device)
        return Scheduler(
            network.eval(),
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            decode=encoder.decode,
            max_batch_size=args.max_batch_size,
            max_slots=args.max_slots,
            decoding=Decoding(args.weights, args.compile),
        )

    worker = Worker(load, args.max_batch_size + args.max_queue)
    limits = Limits(config.max_length, args.max_tokens, config.vocab_size)
    routes = OpenAIRoutes(worker, tokenizer, args.model_id or model_name(args.checkpoint), limits)
    PalmServer(routes, api_key, args.max_body, args.drain_seconds).run(args.host, args.port)
    return 0
