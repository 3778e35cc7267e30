"""The server as clients meet it: the official client for what works, plain sockets for what does not."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm.cli import main
from lit_palm.data.templates import encode_chat
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.sampling import Sampling, row_seeds
from tests.serve.conftest import Offline, Server, write_checkpoint

openai = pytest.importorskip("openai")

QUESTION = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "the cat sat"}]


def chat_ids(offline: Offline, messages: list[dict[str, str]] = QUESTION) -> list[int]:
    return encode_chat(offline.tokenizer, messages, add_generation_prompt=True)[0]


def post(
    server: Server, path: str, body: Any, headers: dict[str, str] | None = None, method: str = "POST"
) -> tuple[int, Any, dict[str, str]]:
    """Status, parsed body and headers of one raw request."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = text
    return response.status, parsed, {k.lower(): v for k, v in response.getheaders()}


# ---------------------------------------------------------------- what works


def test_a_chat_completion_is_the_offline_one_of_the_same_seed(server: Server, offline: Offline) -> None:
    got = server.client().chat.completions.create(
        model="tiny", messages=QUESTION, seed=11, max_tokens=30, n=3, temperature=0.8, top_p=0.95,
        extra_body={"return_token_ids": True},
    )  # fmt: skip
    ids = chat_ids(offline)
    expected = offline.generate(ids, 11, 3, max_new_tokens=30, temperature=0.8, top_p=0.95)
    assert [choice.token_ids for choice in got.choices] == [c.tolist() for c in expected.completions]
    texts = [offline.tokenizer.decode(c.tolist()) for c in expected.completions]
    assert [choice.message.content for choice in got.choices] == texts and len(set(texts)) == 3
    assert [choice.index for choice in got.choices] == [0, 1, 2] and got.choices[0].message.role == "assistant"
    written = sum(map(len, expected.completions))
    assert (got.usage.prompt_tokens, got.usage.completion_tokens) == (len(ids), written)
    assert got.usage.total_tokens == len(ids) + written and got.model == "tiny" and got.object == "chat.completion"
    reasons = ["stop" if reason == "eos" else reason for reason in expected.finish_reason]
    assert [choice.finish_reason for choice in got.choices] == reasons


def test_a_stream_brings_the_same_in_pieces(server: Server, offline: Offline) -> None:
    stream = server.client().chat.completions.create(
        model="tiny", messages=QUESTION, seed=11, max_tokens=30, n=2, temperature=0.8, top_p=0.95, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    chunks = list(stream)
    expected = offline.generate(chat_ids(offline), 11, 2, max_new_tokens=30, temperature=0.8, top_p=0.95)
    texts = {0: "", 1: ""}
    reasons: dict[int, str] = {}
    for chunk in chunks[:-1]:
        assert chunk.usage is None and chunk.object == "chat.completion.chunk" and chunk.id == chunks[0].id
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert [texts[i] for i in (0, 1)] == [offline.tokenizer.decode(c.tolist()) for c in expected.completions]
    assert chunks[0].choices[0].delta.role == "assistant" and reasons.keys() == {0, 1}
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == sum(map(len, expected.completions))
    assert len(chunks) > 10  # it did come in pieces


def test_text_completions_take_texts_and_ids_and_echo(server: Server, offline: Offline) -> None:
    client = server.client()
    got = client.completions.create(model="tiny", prompt=["the cat", "nine"], seed=3, max_tokens=12, n=2, echo=True)
    prompts = [torch.tensor(offline.ids(text)) for text in ("the cat", "the cat", "nine", "nine")]
    expected = CachedEngine().generate(
        offline.network, prompts, Sampling(max_new_tokens=12), row_seeds(3, 0, torch.arange(4)),
        pad_id=offline.tokenizer.pad_id, eos_id=offline.tokenizer.eos_id,
    )  # fmt: skip
    texts = [offline.tokenizer.decode(c.tolist()) for c in expected.completions]
    starts = ["the cat", "the cat", "nine", "nine"]
    assert [choice.text for choice in got.choices] == [a + b for a, b in zip(starts, texts, strict=True)]
    assert got.usage.prompt_tokens == len(prompts[0]) + len(prompts[2])  # each prompt is read once
    by_ids = client.completions.create(model="tiny", prompt=offline.ids("the cat"), seed=3, max_tokens=12)
    assert by_ids.choices[0].text == texts[0]
    pieces = client.completions.create(model="tiny", prompt="the cat", seed=3, max_tokens=12, stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in pieces) == "the cat" + texts[0]
    assert len(client.completions.create(model="tiny", prompt="the cat", extra_body={"min_tokens": 16}).choices) == 1


def test_stop_texts_end_an_answer_and_are_not_part_of_it(server: Server, offline: Offline) -> None:
    free = offline.text("on a", 5, max_new_tokens=60)
    stop = next(
        free[i : i + 2] for i in range(8, 50) if "\ufffd" not in free[i : i + 2] and free.find(free[i : i + 2]) == i
    )
    sampling = {"model": "tiny", "prompt": "on a", "seed": 5, "max_tokens": 60, "stop": [stop, "never said"]}
    got = server.client().completions.create(**sampling)
    assert got.choices[0].text == free[: free.index(stop)] and got.choices[0].finish_reason == "stop"
    chunks = list(server.client().completions.create(**sampling, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == free[: free.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_log_probabilities_in_both_forms(server: Server, offline: Offline) -> None:
    client = server.client()
    got = client.chat.completions.create(
        model="tiny", messages=QUESTION, seed=2, max_tokens=9, logprobs=True, top_logprobs=3
    )
    expected = offline.generate(chat_ids(offline), 2, max_new_tokens=9)
    content = got.choices[0].logprobs.content
    assert [t.logprob for t in content] == pytest.approx(expected.logps[0].tolist(), abs=1e-4)
    assert [t.bytes for t in content] == [[i] for i in expected.completions[0].tolist()]
    for token in content:
        likely = [t.logprob for t in token.top_logprobs]
        assert len(likely) == 3 and likely == sorted(likely, reverse=True)
    ids = offline.ids("the cat")
    legacy = client.completions.create(model="tiny", prompt="the cat", seed=2, max_tokens=9, logprobs=2).choices[0]
    expected = offline.generate(ids, 2, max_new_tokens=9)
    assert legacy.logprobs.token_logprobs == pytest.approx(expected.logps[0].tolist(), abs=1e-4)
    assert all(len(top) == 2 for top in legacy.logprobs.top_logprobs) and legacy.logprobs.text_offset[0] == 0
    streamed = client.chat.completions.create(
        model="tiny", messages=QUESTION, seed=2, max_tokens=9, logprobs=True, stream=True
    )
    told = [t.logprob for chunk in streamed for c in chunk.choices if c.logprobs for t in c.logprobs.content]
    assert told == pytest.approx([t.logprob for t in content], abs=1e-5)


def test_every_way_of_drawing_is_passed_on(server: Server, offline: Offline) -> None:
    settings: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"frequency_penalty": 1.5, "presence_penalty": 1}, {"frequency_penalty": 1.5, "presence_penalty": 1.0}),
        ({"extra_body": {"top_k": 4}}, {"top_k": 4}),
        ({"extra_body": {"min_p": 0.2, "top_k": -1}}, {"min_p": 0.2}),
        ({"extra_body": {"repetition_penalty": 1.4}}, {"repetition_penalty": 1.4}),
        ({"extra_body": {"min_tokens": 20}}, {"min_new_tokens": 20}),
    ]
    answers = set()
    for asked, sampling in settings:
        got = server.client().completions.create(model="tiny", prompt="nine", seed=8, max_tokens=24, **asked)
        assert got.choices[0].text == offline.text("nine", 8, max_new_tokens=24, **sampling), asked
        answers.add(got.choices[0].text)
    assert len(answers) >= 5
    two = [server.client().completions.create(model="tiny", prompt="nine", max_tokens=20).choices[0].text for _ in "ab"]
    assert two[0] != two[1]  # without a seed


def test_models_health_and_parts(server: Server, offline: Offline) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lit-palm"
    assert post(server, "/health", None, method="GET")[:2] == (200, "ok")
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat "}, {"type": "text", "text": "sat"}]}]
    got = client.chat.completions.create(model="tiny", messages=parts, seed=1, max_completion_tokens=5)
    whole = chat_ids(offline, [{"role": "user", "content": "the cat sat"}])
    assert got.choices[0].message.content == offline.text(whole, 1, max_new_tokens=5)
    # special tokens in a message stay text
    sly = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "<eos>"}], max_tokens=1)
    assert sly.usage.prompt_tokens == len(chat_ids(offline, [{"role": "user", "content": "12345"}]))


# ---------------------------------------------------------------- what does not

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 2}
REFUSED: list[tuple[str, Any, int, str | None, str]] = [
    ("chat", b"{not json", 400, None, "not valid JSON"),
    ("chat", b"[" * 15_000, 400, None, "JSON"),
    ("chat", b'"\xff"', 400, None, "not valid JSON"),
    ("chat", b"[1]", 400, None, "not a JSON object"),
    ("chat", {**CHAT, "model": "gpt-5"}, 404, "model", "no model 'gpt-5'"),
    ("chat", {"model": "tiny"}, 400, "messages", "required"),
    ("chat", {**CHAT, "messages": []}, 400, "messages", "at least 1"),
    ("chat", {**CHAT, "messages": [{"content": "hi"}]}, 400, "messages[0].role", "role"),
    ("chat", {**CHAT, "messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "string"),
    ("chat", {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400,
     "messages[0].content", "text"),
    ("chat", {**CHAT, "messages": [{"role": "poet", "content": "x"}]}, 400, "messages", "nobody is called poet"),
    ("chat", {**CHAT, "temperature": "hot"}, 400, "temperature", "number"),
    ("chat", {**CHAT, "temperature": -1}, 400, "temperature", "0 (greedy) or more"),
    ("chat", b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400,
     "temperature", "0 (greedy) or more"),
    ("chat", {**CHAT, "top_p": 0}, 400, "top_p", "above 0"),
    ("chat", {**CHAT, "top_k": 2.5}, 400, "top_k", "integer"),
    ("chat", {**CHAT, "min_tokens": 3}, 400, "min_tokens", "max_new_tokens"),
    ("chat", {**CHAT, "n": 0}, 400, "n", "greater than or equal to 1"),
    ("chat", {**CHAT, "n": 100}, 400, "n", "100 completions"),
    ("chat", {**CHAT, "max_tokens": 0}, 400, "max_tokens", "greater"),
    ("chat", {**CHAT, "max_tokens": 300}, 400, "max_tokens", "maximum context length is 256"),
    ("chat", {**CHAT, "messages": [{"role": "user", "content": "x" * 300}]}, 400, "messages", "maximum context length"),
    ("chat", {**CHAT, "stream": "yes"}, 400, "stream", "boolean"),
    ("chat", {**CHAT, "seed": 2**70}, 400, "seed", ""),
    ("chat", {**CHAT, "stop": ["a"] * 17}, 400, "stop", "up to 16"),
    ("chat", {**CHAT, "stop": ""}, 400, "stop", "at least one character"),
    ("chat", {**CHAT, "top_logprobs": 2}, 400, "top_logprobs", "logprobs"),
    ("chat", {**CHAT, "logprobs": True, "top_logprobs": 99}, 400, "top_logprobs", "20"),
    ("chat", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools", "not supported"),
    ("chat", {**CHAT, "response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    ("chat", {**CHAT, "logit_bias": {"5": 1}}, 400, "logit_bias", "not supported"),
    ("chat", {**CHAT, "temprature": 1}, 400, "temprature", "unknown parameter"),
    ("text", {**TEXT, "prompt": []}, 400, "prompt", "empty"),
    ("text", {**TEXT, "prompt": [5] * 3000 + ["x"] * 900}, 400, "prompt", ""),
    ("text", {**TEXT, "prompt": ["x"] * 1025}, 400, "prompt", ""),
    ("text", {**TEXT, "prompt": ["x"] * 49}, 400, "n", "49 completions"),
    ("text", {**TEXT, **{f"field{i}": 1 for i in range(99)}}, 400, None, "102 fields"),
    ("text", {**TEXT, "prompt": [[]]}, 400, "prompt", "no tokens"),
    ("text", {**TEXT, "prompt": [5, 100_000]}, 400, "prompt", "outside 0 to"),
    ("text", {**TEXT, "prompt": [5, -1]}, 400, "prompt", "outside 0 to"),
    ("text", {**TEXT, "prompt": {"a": 1}}, 400, "prompt", ""),
    ("text", {**TEXT, "suffix": "x"}, 400, "suffix", "not supported"),
    ("text", {**TEXT, "echo": True, "logprobs": 1}, 400, "echo", "not supported"),
    ("text", {**TEXT, "best_of": 3}, 400, "best_of", "not supported"),
]  # fmt: skip
PATHS = {"chat": "/v1/chat/completions", "text": "/v1/completions"}


def test_bad_requests_get_their_status_and_harm_no_stream(server: Server, offline: Offline) -> None:
    """All of them while six streams run, which must end with the text they have offline."""
    client, texts, begun = server.client(), {}, threading.Barrier(7)

    def listen(seed: int) -> None:
        pieces = client.completions.create(
            model="tiny", prompt="over tall trees", seed=seed, max_tokens=230, stream=True
        )
        texts[seed] = next(iter(pieces)).choices[0].text
        begun.wait(30)
        texts[seed] += "".join(chunk.choices[0].text for chunk in pieces)

    threads = [threading.Thread(target=listen, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    begun.wait(30)
    for kind, body, status, param, message in REFUSED:
        got, answer, _ = post(server, PATHS[kind], body)
        assert got == status, (body, answer)
        error = answer["error"]
        assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
        assert error["param"] == param and message in error["message"], (body, error)
    big = post(server, PATHS["chat"], b" " * 20_001)
    assert big[0] == 413 and "20000 bytes" in big[1]["error"]["message"]
    assert post(server, "/v1/nothing", {})[0] == 404 and "error" in post(server, "/v1/nothing", {})[1]
    assert post(server, PATHS["chat"], None, method="GET")[0] == 405
    assert post(server, PATHS["chat"], CHAT, {"Content-Type": "text/plain"})[0] == 415
    for thread in threads:
        thread.join(60)
    for seed in range(6):
        assert texts[seed] == offline.text("over tall trees", seed, max_new_tokens=230), seed
    assert post(server, PATHS["text"], TEXT)[0] == 200
    assert not any("Traceback" in line for line in server.log)


def test_the_clients_errors_are_of_the_right_class(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt="x", max_tokens=999)
    assert long.value.code == "context_length_exceeded" and long.value.param == "max_tokens"


def test_a_body_without_a_length_is_measured_as_it_comes(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        try:
            for _ in range(30):
                raw.sendall(b"400\r\n" + b" " * 1024 + b"\r\n")
                time.sleep(0.01)
        except OSError:  # it hangs up
            pass
        assert b" 413 " in raw.recv(4096)


@pytest.fixture(scope="module")
def locked(start: Callable[..., Server]) -> Server:
    """One that asks for a key."""
    return start(LIT_PALM_API_KEY="open sesame")


def test_a_key_is_asked_for(locked: Server) -> None:
    server = locked
    with pytest.raises(openai.AuthenticationError) as refused:
        server.client(api_key="wrong").models.list()
    assert refused.value.status_code == 401 and refused.value.code == "invalid_api_key"
    assert server.client(api_key="open sesame").models.list().data[0].id == "tiny"
    for headers in ({}, {"Authorization": "open sesame"}, {"Authorization": "Bearer "}, {"X-API-Key": "open sesame"}):
        for path in ("/v1/models", "/info", "/", "/v1/nothing"):
            assert post(server, path, None, headers, "GET")[0] == 401
    assert post(server, PATHS["text"], b" " * 2_000_000)[0] == 401  # before anything is read
    assert post(server, "/health", None, method="GET")[0] == 200  # for those that watch over it


def test_a_full_queue_and_a_client_that_leaves(start: Callable[..., Server], tmp_path: Path) -> None:
    # seconds for a completion, wherever this runs
    served = write_checkpoint(tmp_path / "slow", d_model=256, num_layers=12, max_length=4096)
    offline = Offline(served)
    arguments = "--max_batch_size", "1", "--max_queue", "1", "--model_id", "one/row", "--drain_seconds", "0"
    server = start(*arguments, served=served)
    client = server.client()
    long = {"model": "one/row", "prompt": "a", "max_tokens": 4000, "extra_body": {"min_tokens": 4000}}
    running = client.completions.create(**long, stream=True)
    next(iter(running))
    waiting = client.completions.create(**long, stream=True)
    with pytest.raises(openai.RateLimitError) as full:
        client.completions.create(**long)
    assert full.value.code == "queue_full" and int(full.value.response.headers["retry-after"]) >= 1
    with pytest.raises(openai.BadRequestError, match="3 completions at once"):
        client.completions.create(**long, n=3)
    # who waits gets its turn when who runs has gone, well before that one's 4,000 tokens
    running.close()
    first = next(iter(waiting))
    assert first.choices[0].text is not None
    waiting.close()
    # a client that does not stream leaves too
    with socket.create_connection(("127.0.0.1", server.port)) as raw:
        body = json.dumps({**{k: v for k, v in long.items() if k != "extra_body"}, "min_tokens": 4000}).encode()
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            + str(len(body)).encode()
            + b"\r\n\r\n"
            + body
        )
        time.sleep(0.1)
    started = time.monotonic()
    while True:
        try:
            got = client.completions.create(model="one/row", prompt="the cat", seed=4, max_tokens=8)
            break
        except openai.RateLimitError:
            assert time.monotonic() - started < 10
            time.sleep(0.02)
    assert got.choices[0].text == offline.text("the cat", 4, max_new_tokens=8)
    # a stream that takes too long to end is told why
    stream = client.completions.create(**long, stream=True)
    next(iter(stream))
    os.kill(server.process.pid, signal.SIGINT)
    with pytest.raises(openai.APIError, match="shutting down"):
        for _ in stream:
            pass
    assert server.process.wait(30) == 0 and not any("Traceback" in line for line in server.log)


def test_a_signal_lets_streams_end_and_frees_the_port(locked: Server, offline: Offline) -> None:
    client = locked.client(api_key="open sesame")
    stream = client.completions.create(model="tiny", prompt="fly", seed=6, max_tokens=250, stream=True)
    text = next(iter(stream)).choices[0].text
    os.kill(locked.process.pid, signal.SIGTERM)
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == offline.text("fly", 6, max_new_tokens=250)
    assert locked.process.wait(30) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", locked.port), timeout=5)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that were closed linger
        again.bind(("127.0.0.1", locked.port))
        again.listen()
    assert not any("Traceback" in line for line in locked.log)


@pytest.mark.parametrize(
    "arguments, fault",
    [
        (["missing.ckpt"], "does not exist"),
        (["CKPT", "--port", "99999"], "--port is 99999"),
        (["CKPT", "--host", "nowhere.invalid"], "cannot listen"),
        (["CKPT", "--max_batch_size", "0"], "--max_batch_size is 0"),
        (["CKPT", "--api_key", ""], "--api_key is empty"),
        (["CKPT", "--prot", "1"], "prot"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], fault: str
) -> None:
    assert main(["serve", *(str(checkpoint) if a == "CKPT" else a for a in arguments)]) == 2
    said = capsys.readouterr().err.strip()
    assert fault in said and len(said.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(server: Server, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(checkpoint), "--port", str(server.port)]) == 2
    assert f"cannot listen at 127.0.0.1:{server.port}" in capsys.readouterr().err


def test_without_litserve_it_says_what_to_install(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "litserve", None)
    assert main(["serve", str(checkpoint)]) == 2
    assert "pip install 'lit-palm[serve]'" in capsys.readouterr().err
