"""The server in this process, around networks that wait, fail or give no numbers: what a client sees then."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lit_palm.data.tokenizers import ByteTokenizer
from lit_palm.models import PaLM, PaLMConfig
from lit_palm.rollout.continuous import Scheduler

pytest.importorskip("litserve")
from lit_palm.serve.routes import Limits, OpenAIRoutes
from lit_palm.serve.server import PalmServer
from lit_palm.serve.worker import Worker

TOKENIZER = ByteTokenizer()


def network() -> PaLM:
    torch.manual_seed(0)
    config = PaLMConfig(
        vocab_size=TOKENIZER.vocab_size, d_model=16, num_layers=1, num_heads=2, head_dim=8, max_length=64
    )
    return config.build().eval()


class Running:
    """A server in a thread, with the scheduler that `load` makes."""

    def __init__(self, load: Callable[[], Scheduler], drain_seconds: float = 10.0) -> None:
        self.worker = Worker(load, 8)
        routes = OpenAIRoutes(self.worker, TOKENIZER, "m", Limits(64, None, TOKENIZER.vocab_size))
        self.server = PalmServer(routes, None, 10_000, drain_seconds)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        deadline = time.monotonic() + 30
        while not (hasattr(self.server, "http") and self.server.http.started) and time.monotonic() < deadline:
            time.sleep(0.01)
        self.port = int(self.server.greeting.rpartition(":")[2].removesuffix("/v1"))

    def _run(self) -> None:
        try:
            self.server.run(port=0)
        except BaseException as error:
            self.error = error

    def ask(self, path: str, body: Any = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(
            "GET" if body is None else "POST", path, body and json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text) if text.startswith("{") else text

    def complete(self, **fields: Any) -> tuple[int, Any]:
        return self.ask("/v1/completions", {"model": "m", "prompt": "abc", "max_tokens": 4, **fields})

    def wait_for(self, state: str) -> None:
        deadline = time.monotonic() + 20
        while self.worker.state != state:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.05)  # and LitServe has been told

    def end(self) -> None:
        self.server.http.handle_exit(15, None)
        self.thread.join(30)
        assert not self.thread.is_alive()


def make(net: Any, **options: Any) -> Scheduler:
    return Scheduler(net, pad_id=TOKENIZER.pad_id, eos_id=TOKENIZER.eos_id, decode=TOKENIZER.decode, **options)


@pytest.fixture
def begin() -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def start(*args: Any, **options: Any) -> Running:
        running.append(Running(*args, **options))
        return running[-1]

    yield start
    for one in running:
        if one.thread.is_alive():
            one.end()


def test_loading_ready_draining(begin: Callable[..., Running]) -> None:
    loaded, go = threading.Event(), threading.Event()
    go.set()
    net = network()
    net.register_forward_pre_hook(lambda *_: (go.wait(20), None)[1])

    def load() -> Scheduler:
        loaded.wait(20)
        return make(net)

    running = begin(load)
    assert running.ask("/health") == (503, "not ready")
    status, answer = running.complete()
    assert status == 503 and answer["error"]["code"] == "loading" and answer["error"]["type"] == "server_error"
    assert running.ask("/v1/models")[0] == 200
    loaded.set()
    running.wait_for("ready")
    assert running.ask("/health") == (200, "ok") and running.complete()[0] == 200
    go.clear()  # a request that is under way when the signal comes
    late: list[tuple[int, Any]] = []
    asking = threading.Thread(target=lambda: late.append(running.complete(max_tokens=20, seed=1)))
    asking.start()
    while not running.worker.num_rows:
        time.sleep(0.01)
    running.server.http.handle_exit(15, None)
    assert running.ask("/health") == (503, "not ready")
    status, answer = running.complete()
    assert status == 503 and answer["error"]["code"] == "draining"
    go.set()
    asking.join(20)
    assert late[0][0] == 200 and late[0][1]["usage"]["completion_tokens"] > 0
    running.thread.join(20)
    assert not running.thread.is_alive() and running.error is None


def test_a_network_that_cannot_be_loaded_ends_the_server(begin: Callable[..., Running]) -> None:
    def load() -> Scheduler:
        raise ValueError("x.ckpt: the weights are cut short")

    running = begin(load)
    running.thread.join(20)
    assert not running.thread.is_alive() and "cut short" in str(running.error)


def test_a_thread_that_dies_ends_the_server_rather_than_hang_its_clients(begin: Callable[..., Running]) -> None:
    running = begin(lambda: make(network()))
    running.wait_for("ready")

    def broken(*_: Any) -> None:
        raise KeyError("a mistake in the scheduler")

    running.worker._listen = broken  # type: ignore[method-assign]
    with pytest.raises(OSError):  # it hangs up, or has gone already
        for _ in range(100):
            running.complete()
    running.thread.join(20)
    assert not running.thread.is_alive() and isinstance(running.error, KeyError)


def test_a_row_that_is_no_number_and_a_step_that_fails_leave_the_server_well(begin: Callable[..., Running]) -> None:
    net = network()
    # whoever has just read a "!" gets no numbers
    net.register_forward_hook(
        lambda _, args, logits: logits.masked_fill((args[0] == ord("!")).any(1, keepdim=True), float("nan"))
    )
    fail = threading.Event()

    def hook(*_: Any) -> None:
        if fail.is_set():
            fail.clear()
            raise RuntimeError("out of memory")

    net.register_forward_pre_hook(hook)
    running = begin(lambda: make(net))
    running.wait_for("ready")
    other: list[tuple[int, Any]] = []
    expected = running.complete(max_tokens=50, temperature=0)
    beside = threading.Thread(target=lambda: other.append(running.complete(max_tokens=50, temperature=0)))
    beside.start()
    status, answer = running.complete(prompt="abc!")
    assert status == 500 and "not finite" in answer["error"]["message"] and answer["error"]["type"] == "server_error"
    beside.join(20)
    assert other[0][0] == 200 and other[0][1]["choices"] == expected[1]["choices"]
    fail.set()
    status, answer = running.complete()
    assert status == 500 and "RuntimeError" in answer["error"]["message"]
    assert "out of memory" not in answer["error"]["message"]  # what went wrong inside is for the log
    assert running.complete(max_tokens=50, temperature=0)[1]["choices"] == expected[1]["choices"]
