"""`lit-palm serve` under streaming clients."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from lit_palm.data.tokenizers import ByteTokenizer
from tests.benchmarks.inputs import Size
from tests.benchmarks.ours.running import config
from tests.serve.load import Load, clients

TOKENIZER = ByteTokenizer()


def checkpoint(size: Size) -> Path:
    """The network as a folder that `lit-palm serve` takes."""
    from safetensors.torch import save_file

    from lit_palm.modules.checkpoint import FORMAT, config_to_dict

    torch.manual_seed(0)
    network, folder = config(size).build(), Path(tempfile.mkdtemp())
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


class Clients:
    """Seconds a token over `count` clients of a server of its own, each of which streams again and again.

    Args:
        size: the network.
        count: clients.
        duration: seconds that they ask for.
        new: tokens of every completion.
    """

    def __init__(self, size: dict[str, int], count: int, duration: float, new: int) -> None:
        import litserve  # noqa: F401  # an absent package is told before anything starts

        self.count, self.duration, self.new = count, duration, new
        command = [sys.executable, "-m", "lit_palm", "serve", str(checkpoint(Size(**size))), "--port", "0"]
        self.server = subprocess.Popen([*command, "--model_id", "m"], stderr=subprocess.PIPE, text=True)
        assert self.server.stderr is not None
        lines: list[str] = []
        while not (match := re.search(r"127\.0\.0\.1:(\d+)", lines[-1] if lines else "")):
            lines.append(self.server.stderr.readline())
            if not lines[-1]:
                raise RuntimeError("the server ended: " + "".join(lines[-5:]))
        self.port = int(match[1])

    def __call__(self) -> dict[str, Any]:
        limit = (self.new, self.new)
        asked = clients("127.0.0.1", self.port, "m", self.count, self.duration, limit, minimum=True)
        load: Load = asyncio.run(asked)
        assert not load.errors, load.errors[0]
        return {"cost": 1 / load.rate, "tokens": 1, "completions": len(load.heard)}

    def close(self) -> None:
        """Stop the server."""
        self.server.terminate()
        self.server.wait(30)
