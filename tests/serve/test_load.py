"""Many streams at once: no error, no token lost or changed, no memory that grows; bad requests in between."""

from __future__ import annotations

import asyncio
import http.client
import threading
import time
from collections.abc import Callable

import pytest
import torch

from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.sampling import Sampling, row_seeds, uniform
from tests.serve.conftest import Offline, Server
from tests.serve.load import Heard, Load, clients


def expected(offline: Offline, heard: list[Heard]) -> list[list[int]]:
    """What each request gives without a server, by the engine that the server does not use."""
    tokens: list[list[int]] = [[] for _ in heard]
    for limit in sorted({one.max_tokens for one in heard}):
        rows = [row for row, one in enumerate(heard) if one.max_tokens == limit]
        seeds = torch.cat([row_seeds(heard[row].seed, 0, torch.arange(1)) for row in rows])
        got = CachedEngine(256).generate(
            offline.network,
            [torch.tensor(offline.ids(heard[row].prompt)) for row in rows],
            Sampling(max_new_tokens=limit),
            seeds,
            pad_id=offline.tokenizer.pad_id,
            eos_id=offline.tokenizer.eos_id,
        )
        for row, completion in zip(rows, got.completions, strict=True):
            tokens[row] = completion.tolist()
    return tokens


def tied(offline: Offline, one: Heard, tokens: list[int]) -> bool:
    """Whether both went on from a uniform number that lies within rounding of the border between two tokens."""
    step = next((i for i, pair in enumerate(zip(one.tokens, tokens, strict=False)) if pair[0] != pair[1]), None)
    assert step is not None, f"one goes on where the other ends: {one}, {tokens}"
    with torch.no_grad():
        logits = offline.network(torch.tensor([offline.ids(one.prompt) + tokens[:step]]))[0, -1]
    border = logits.double().softmax(0).cumsum(0)[min(one.tokens[step], tokens[step])]
    drawn = uniform(row_seeds(one.seed, 0, torch.arange(1)), step)
    return bool((border - drawn).abs() < 1e-5)


def check(load: Load, offline: Offline) -> None:
    """Every stream whole, and equal to the offline completion of its seed."""
    assert load.errors == []
    wrong = []
    for one, tokens in zip(load.heard, expected(offline, load.heard), strict=True):
        assert one.usage == len(one.tokens) and one.text == offline.tokenizer.decode(one.tokens)
        assert one.reason == ("length" if one.tokens[-1] != offline.tokenizer.eos_id else "stop")
        assert one.reason == "stop" or len(one.tokens) == one.max_tokens
        # sums in batches of another size differ in their last bit; a uniform number may fall in between
        if one.tokens != tokens:
            assert tied(offline, one, tokens), (one, tokens)
            wrong.append(one)
    assert sum(len(one.tokens) for one in load.heard) > 500
    assert len(wrong) <= 1 + len(load.heard) / 1000, wrong


def bad_requests(server: Server, until: Callable[[], bool]) -> dict[int, int]:
    """Malformed, oversized, unknown and unauthorised requests, one after the other; how often each status came."""
    seen: dict[int, int] = {}
    good = "Bearer key"
    requests = [
        (good, b"{broken"), (good, b" " * 60_000), ("Bearer wrong", b"{}"), (good, b'{"model": "x", "prompt": "a"}'),
        (good, b'{"model": "tiny", "prompt": "a", "max_tokens": 1000}'),
    ]  # fmt: skip
    while not until():
        for key, body in requests:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
            headers = {"Content-Type": "application/json", "Authorization": key}
            try:
                connection.request("POST", "/v1/completions", body, headers)
                status = connection.getresponse().status
            except (BrokenPipeError, ConnectionResetError):  # refused while it was still being sent
                status = 413
            seen[status] = seen.get(status, 0) + 1
            connection.close()
        time.sleep(0.1)
    return seen


def run(
    server: Server, count: int, seconds: float, lengths: tuple[int, int]
) -> tuple[Load, dict[int, int], list[tuple[float, int]]]:
    """The load, the statuses of bad requests in the meantime, and the server's memory as time went by."""
    done, statuses = threading.Event(), []
    other = threading.Thread(target=lambda: statuses.append(bad_requests(server, done.is_set)))
    memory: list[tuple[float, int]] = []
    other.start()
    load = asyncio.run(
        clients(
            "127.0.0.1", server.port, "tiny", count, seconds, lengths, lambda now: memory.append((now, server.memory()))
        )
    )
    done.set()
    other.join(30)
    return load, statuses[0], memory


def test_sixteen_clients_for_six_seconds(start: Callable[..., Server], offline: Offline) -> None:
    server = start("--max_batch_size", "12", "--max_body", "50000")
    load, statuses, _ = run(server, 16, 6, (10, 60))
    check(load, offline)
    assert len(load.heard) > 32
    # nobody asked for a key, so the wrong one is a request without a model
    assert statuses.keys() == {400, 404, 413}
    assert server.end() == 0 and not any("Traceback" in line for line in server.log)


@pytest.mark.slow
def test_sixty_four_clients_for_a_minute(start: Callable[..., Server], offline: Offline) -> None:
    server = start("--max_batch_size", "64", "--max_body", "50000")
    load, statuses, memory = run(server, 64, 60, (20, 200))
    check(load, offline)
    assert statuses.keys() == {400, 404, 413}
    # the first third fills caches of every kind; afterwards a minute adds nothing that an hour would make large
    early = max(size for now, size in memory if 10 < now < 30)
    late = max(size for now, size in memory if now >= 40)
    print(
        f"{len(load.heard)} streams, {load.rate:.0f} tokens/s, memory {early / 2**20:.1f} then {late / 2**20:.1f} MiB"
    )
    assert late - early < 4 * 2**20
    assert server.end() == 0 and not any("Traceback" in line for line in server.log)


def test_the_engines_agree_on_what_is_expected(offline: Offline) -> None:
    """The comparison of this file is worth something: another seed or prompt gives other tokens."""
    heard = [Heard("the cat", seed, 20) for seed in range(8)]
    tokens = expected(offline, heard)
    assert len({tuple(t) for t in tokens}) == 8
    assert not tied(offline, Heard("the cat", 0, 20, tokens=tokens[1]), tokens[0])
    got = ContinuousEngine(3).generate(
        offline.network,
        [torch.tensor(offline.ids("the cat"))] * 8,
        Sampling(max_new_tokens=20),
        torch.cat([row_seeds(seed, 0, torch.arange(1)) for seed in range(8)]),
        pad_id=offline.tokenizer.pad_id,
        eos_id=offline.tokenizer.eos_id,
    )
    assert [c.tolist() for c in got.completions] == tokens
