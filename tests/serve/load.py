"""Many clients at once against a server: streams over plain sockets, every token of which is compared afterwards.

python -m tests.serve.load http://127.0.0.1:8000 MODEL --clients 64 --seconds 60     # only the load and its figures
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

PROMPTS = ["the cat", "nine small birds fly over", "a", "saw tall trees and a warm mat on which the cat sat", "on"]


@dataclass
class Heard:
    """One stream as a client heard it."""

    prompt: str
    seed: int
    max_tokens: int
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    usage: int | None = None
    first: float = 0.0
    """Seconds until the first token."""


@dataclass
class Load:
    """What all clients heard."""

    heard: list[Heard] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens a second over all clients."""
        return sum(len(one.tokens) for one in self.heard) / self.seconds


async def stream(host: str, port: int, body: dict[str, Any], heard: Heard, chat: bool = False) -> None:
    """One streamed text completion over a connection of its own."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        begun = time.monotonic()
        status = await reader.readline()
        while (await reader.readline()).strip():
            pass
        if b" 200 " not in status:
            raise RuntimeError(f"{status!r}: {(await reader.read())!r}")
        done = False
        async for line in reader:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                done = True
                break
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(str(chunk))
            if chunk.get("usage"):
                heard.usage = chunk["usage"]["completion_tokens"]
            for choice in chunk["choices"]:
                heard.first = heard.first or time.monotonic() - begun
                heard.text += choice["text"]
                heard.tokens += choice.get("token_ids", [])
                heard.reason = choice["finish_reason"] or heard.reason
        if not done:
            raise RuntimeError("the stream broke off")
    finally:
        writer.close()


async def clients(
    host: str,
    port: int,
    model: str,
    count: int,
    seconds: float,
    lengths: tuple[int, int],
    watch: Callable[[float], object] = lambda now: None,
    minimum: bool = False,
) -> Load:
    """So many clients, each asking again as soon as it has been answered; `watch` is called every second or so."""
    load, start = Load(), time.monotonic()

    async def one(number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() - start < seconds:
            heard = Heard(chance.choice(PROMPTS), chance.randrange(2**31), chance.randint(*lengths))
            body: dict[str, Any] = {
                "model": model,
                "prompt": heard.prompt,
                "seed": heard.seed,
                "max_tokens": heard.max_tokens,
                "stream": True,
                "return_token_ids": True,
                "stream_options": {"include_usage": True},
            }
            if minimum:
                body["min_tokens"] = heard.max_tokens
            try:
                await stream(host, port, body, heard)
                load.heard.append(heard)
            except Exception as error:
                load.errors.append(f"client {number}: {type(error).__name__}: {error}")

    async def watching() -> None:
        while True:
            watch(time.monotonic() - start)
            await asyncio.sleep(1)

    watcher = asyncio.create_task(watching())
    await asyncio.gather(*(one(number) for number in range(count)))
    watcher.cancel()
    load.seconds = time.monotonic() - start
    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    host, _, port = args.url.removeprefix("http://").partition(":")
    load = asyncio.run(clients(host, int(port), args.model, args.clients, args.seconds, (16, 64)))
    first = sorted(one.first for one in load.heard)
    print(f"{len(load.heard)} streams, {len(load.errors)} errors, {load.rate:.0f} tokens a second")
    print(f"first token after {first[len(first) // 2]:.3f} s in the middle, {first[-1]:.3f} s at most")


if __name__ == "__main__":
    main()
