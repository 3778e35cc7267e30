"""`RemoteEngine` against real HTTP servers that behave, and that do not."""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm.models.palm import PaLMConfig
from lit_palm.rollout.remote import RemoteEngine
from lit_palm.rollout.remote_http import Client, EngineError
from lit_palm.rollout.sampling import Sampling
from tests.modules.remote_runs import fake_server

EOS = 1


@pytest.fixture(scope="module")
def network() -> Any:
    return PaLMConfig(d_model=8, num_layers=1, num_heads=1, head_dim=8, max_length=32, vocab_size=50).build()


def choices(body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A well-formed answer: as many tokens as were asked for, the first of them that of the prompt."""
    made = []
    for index, prompt in enumerate(body["prompt"]):
        ids = [prompt[0]] * body["max_tokens"]
        choice = {"index": index, "text": "", "finish_reason": "length", "token_ids": ids,
                  "logprobs": {"token_logprobs": [-0.5] * len(ids)}, **changes}  # fmt: skip
        made.append(choice)
    return {"choices": made}


def generate(engine: RemoteEngine, network: Any, count: int = 3, **sampling: Any) -> Any:
    prompts = [torch.tensor([5 + i, 9]) for i in range(count)]
    settings = Sampling(**{"max_new_tokens": 4, **sampling})
    seeds = torch.arange(100, 100 + count)
    return engine.generate(network, prompts, settings, seeds, pad_id=0, eos_id=EOS, decode=lambda ids: "x" * len(ids))


# ------------------------------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize("server", ["lit-palm", "vllm", "sglang"])
def test_requests_are_in_the_servers_own_terms(server: Any, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    with fake_server(lambda path, body: (200, choices(body))) as (url, seen):
        engine = RemoteEngine(f"{url}/v1", "w", server, "m", api_key_variable="MY_KEY")
        found = generate(engine, network, top_k=7, min_p=0.1, repetition_penalty=1.2, stop=["ab"], min_new_tokens=2)
    assert [c.tolist() for c in found.completions] == [[5] * 4, [6] * 4, [7] * 4]  # each row has its own
    assert found.finish_reason == ["length"] * 3 and found.ended == [False] * 3
    assert all(torch.equal(x, torch.full((4,), -0.5)) for x in found.logps)
    assert {path for path, _ in seen} == {"/v1/completions"} and all(b["key"] == "Bearer secret" for _, b in seen)
    body = min((b for _, b in seen), key=lambda b: b["prompt"])
    asked = {"model": "m", "max_tokens": 4, "min_tokens": 2, "temperature": 1.0, "top_p": 1.0, "top_k": 7, "min_p": 0.1,
             "repetition_penalty": 1.2, "stop": ["ab"], "logprobs": 0, "return_token_ids": True}  # fmt: skip
    assert asked.items() <= body.items()
    if server == "lit-palm":
        assert len(seen) == 1 and body["prompt"] == [[5, 9], [6, 9], [7, 9]] and body["row_seeds"] == [100, 101, 102]
    else:  # a request has one seed there
        assert len(seen) == 3 and sorted(b["seed"] for _, b in seen) == [100, 101, 102]
        assert body["prompt"] == [[5, 9]] and body["stop_token_ids"] == [EOS]
    assert body.get("ignore_eos", False) is (server == "vllm")
    assert body.get("include_stop_str_in_output", False) is (server == "vllm")


def test_ends_are_told_apart(network: Any) -> None:
    ends = {"eos": ([7, EOS], "stop", []), "stop": ([7, 8], "stop", ["xx"]), "length": ([7] * 4, "length", [])}
    for reason, (ids, said, stop) in ends.items():
        told = {"token_ids": ids, "finish_reason": said, "logprobs": {"token_logprobs": [-1.0] * len(ids)}}
        with fake_server(lambda path, body, told=told: (200, choices(body, **told))) as (url, _):
            found = generate(RemoteEngine(url, "w", model="m"), network, 1, stop=stop)
        assert found.finish_reason == [reason] and found.ended == [reason != "length"]


def test_the_only_model_is_found(network: Any) -> None:
    def answer(names: list[str]) -> Any:
        models = {"data": [{"id": name} for name in names]}
        return lambda path, body: (200, models if path == "/v1/models" else choices(body))

    with fake_server(answer(["tiny"])) as (url, seen):
        engine = RemoteEngine(url, "w")
        generate(engine, network), generate(engine, network)
    assert [path for path, _ in seen] == ["/v1/models", "/v1/completions", "/v1/completions"]
    assert all(body["model"] == "tiny" for path, body in seen if path == "/v1/completions")
    with fake_server(answer(["a", "b"])) as (url, _), pytest.raises(EngineError, match="models a, b: say which"):
        generate(RemoteEngine(url, "w"), network)


# ------------------------------------------------------------------------------------------ answers that are wrong


BAD: list[tuple[dict[str, Any], str]] = [
    ({"token_ids": None}, "no token_ids"),
    ({"token_ids": ["5"] * 4}, "no token_ids"),
    ({"logprobs": None}, "no log-probabilities"),
    ({"logprobs": {"token_logprobs": [-1.0] * 3}}, "3 log-probabilities for 4 tokens"),
    ({"logprobs": {"token_logprobs": [-1.0, None, -1.0, -1.0]}}, "log-probabilities that are none"),
    ({"logprobs": {"token_logprobs": [-1.0, math.nan, -1.0, -1.0]}}, "log-probabilities that are none"),
    ({"logprobs": {"token_logprobs": [2.0] * 4}}, "log-probabilities that are none"),
    ({"token_ids": [5] * 5}, "5 tokens, 1 to 4"),
    ({"token_ids": []}, "0 tokens"),
    ({"token_ids": [5, 50, 5, 5]}, "another model"),
    ({"token_ids": [5, 5], "logprobs": {"token_logprobs": [-1.0, -1.0]}}, "ran out of room after 2"),
    ({"finish_reason": "abort"}, "ended with 'abort'"),
    ({"finish_reason": "stop"}, "where the tokeniser's EOS is 1"),
    ({"index": 7}, "choices for 3 prompts"),
]


@pytest.mark.parametrize(("wrong", "told"), BAD)
def test_a_wrong_answer_is_named(wrong: dict[str, Any], told: str, network: Any) -> None:
    answer = fake_server(lambda path, body: (200, choices(body, **wrong)))
    with answer as (url, _), pytest.raises(EngineError, match=told) as caught:
        generate(RemoteEngine(url, "w", model="m"), network)
    assert url in str(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (400, {"error": {"message": "no such field"}}, r"HTTP 400 \(no such field\)"),
        (401, {"error": {"message": "bad key"}}, "api_key_variable"),
        (404, {"detail": "Not Found"}, "engine.model"),
        (200, b"<html>", "not JSON"),
        (200, [1], "no choices"),
    ],
)
def test_a_refusal_is_told_at_once(status: int, body: Any, told: str, network: Any) -> None:
    with fake_server(lambda path, asked: (status, body)) as (url, seen), pytest.raises(EngineError, match=told):
        generate(RemoteEngine(url, "w", model="m", server="vllm", concurrency=1), network, 1)
    assert len(seen) == 1


# ------------------------------------------------------------------------------------------ connections


def test_a_busy_server_is_asked_again(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "_pause", lambda self, attempt, after: 0.01)
    left = [503, 429, 429, 502]

    def answer(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        return (left.pop(), {"error": "busy"}) if left else (200, choices(body))

    with fake_server(answer) as (url, seen):
        assert len(generate(RemoteEngine(url, "w", model="m"), network).completions) == 3
    assert len(seen) == 5
    left[:] = [503] * 9
    with fake_server(answer) as (url, seen), pytest.raises(EngineError, match=r"after 3 attempts \(HTTP 503: busy\)"):
        generate(RemoteEngine(url, "w", model="m", retries=2), network)
    assert len(seen) == 3
    # a queue that is full is waited for as long as an answer may take
    left[:] = [429] * 9
    with fake_server(answer) as (url, seen):
        assert len(generate(RemoteEngine(url, "w", model="m", retries=0), network).completions) == 3
    left[:] = [429] * 10**6
    with fake_server(answer) as (url, seen), pytest.raises(EngineError, match=r"HTTP 429: busy"):
        generate(RemoteEngine(url, "w", model="m", retries=0, timeout=0.3), network)
    assert len(seen) > 3


def test_pauses_double_and_heed_the_server() -> None:
    client = Client("http://127.0.0.1:1", None, 1, 1)
    for attempt, pause in ((1, 0.5), (2, 1), (4, 4), (20, 30)):
        assert 0.75 * pause <= client._pause(attempt, None) <= 1.25 * pause
    assert 7.5 <= client._pause(1, "10") <= 12.5


def test_nobody_there_and_no_answer_in_time(network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Client, "_pause", lambda self, attempt, after: 0.0)
    with pytest.raises(EngineError, match=r"http://127.0.0.1:9: .* given up after 2 attempts .*--ckpt_path"):
        generate(RemoteEngine("http://127.0.0.1:9", "w", model="m", retries=1), network)
    release = threading.Event()

    def slow(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        release.wait(5)
        return 200, choices(body)

    with fake_server(slow) as (url, _):
        with pytest.raises(EngineError, match=r"no answer within 0\.2 s"):
            generate(RemoteEngine(url, "w", model="m", retries=0, timeout=0.2), network)
        # a call in another thread ends when it is cancelled, long before its answer
        engine, failed = RemoteEngine(url, "w", model="m"), []

        def run() -> None:
            try:
                generate(engine, network)
            except EngineError as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.2)
        started = time.monotonic()
        engine.cancel()
        thread.join(4)
        assert failed and time.monotonic() - started < 2
        release.set()


def test_many_rows_are_asked_for_at_once(network: Any) -> None:
    def slow(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.2)
        return 200, choices(body)

    with fake_server(slow) as (url, _):
        started = time.monotonic()
        generate(RemoteEngine(url, "w", "vllm", "m"), network, 20)
        assert time.monotonic() - started < 2  # one after the other would be 4 seconds


# ------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"url": "127.0.0.1:8000"}, "engine.url"),
        ({"url": "file:///x"}, "engine.url"),
        ({"url": "http://user:key@host"}, "engine.url"),
        ({"server": "tgi"}, "choose lit-palm, vllm, sglang"),
        ({"logprobs": "no"}, "choose tempered, raw, processed"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0}, "engine.timeout"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RemoteEngine(**{"url": "http://127.0.0.1:1", "weights_dir": "w", **arguments})


def test_log_probabilities_that_training_does_not_compute_are_refused() -> None:
    def check(server: Any, logprobs: Any = None, **sampling: Any) -> None:
        RemoteEngine("http://127.0.0.1:1", "w", server, logprobs=logprobs).check(Sampling(**sampling))

    check("vllm", temperature=1.0, top_p=0.9)
    check("vllm", "processed", temperature=0.7)
    check("lit-palm", temperature=0.7, top_p=0.9)
    check("sglang", temperature=0.7)
    with pytest.raises(ValueError, match="--logprobs-mode processed_logprobs"):
        check("vllm", temperature=0.7)
    with pytest.raises(ValueError, match="leave those out"):
        check("vllm", "processed", top_p=0.9)


# ------------------------------------------------------------------------------------------ weights


def test_weights_are_told_of_in_the_servers_own_terms(tmp_path: Path) -> None:
    def write(folder: str, layout: str) -> None:
        Path(folder).mkdir()
        (Path(folder) / layout).touch()

    told = {
        "lit-palm": [("/update_weights_from_disk", {"weight_version": "3-a"})],
        "sglang": [("/update_weights_from_disk", {"weight_version": "3-a", "flush_cache": True})],
        "vllm": [("/collective_rpc", {"method": "reload_weights"}), ("/reset_prefix_cache", {})],
    }
    for server, expected in told.items():
        place = tmp_path / server
        place.mkdir()
        ok: dict[str, Any] = {"success": True, "weight_version": "3-a"}
        lying: list[list[str]] = []

        def answer(path: str, body: Any, ok: Any = ok, lying: Any = lying, place: Path = place) -> tuple[int, Any]:
            lying.append([f"{p.parent.name}/{p.name}" for p in place.glob("*/*")])
            return 200, ok

        layout = "lit-palm" if server == "lit-palm" else "huggingface"
        with fake_server(answer) as (url, seen):
            engine = RemoteEngine(url, str(place), server, "m")  # type: ignore[arg-type]
            engine.update("3-a", write)
            folder = str(place / "3-a")
            assert [path for path, _ in seen] == [path for path, _ in expected]
            for (_, body), (_, fields) in zip(seen, expected, strict=True):
                assert fields.items() <= body.items()
            first = seen[0][1]
            assert folder == (first["kwargs"]["weights_path"] if server == "vllm" else first["model_path"])
            ok["weight_version"] = "4-a"
            engine.update("4-a", write)
            assert [lying[0], lying[-1]] == [[f"3-a/{layout}"], [f"4-a/{layout}"]]
            assert not list(place.iterdir()), "what the server has read is removed"
            count = len(seen)
            engine.update("5-a", None)  # another process: it only takes note
            assert engine.version == "5-a" and len(seen) == count


def test_a_server_that_does_not_take_the_weights_is_an_error(tmp_path: Path) -> None:
    def write(folder: str, layout: str) -> None:
        Path(folder).mkdir(exist_ok=True)

    for server, answer, match in (
        ("lit-palm", (200, {"weight_version": "2-b"}), "was given the weights 1-a"),
        ("sglang", (200, {"success": False, "message": "no memory"}), "no memory"),
        ("vllm", (404, {"detail": "Not Found"}), "VLLM_SERVER_DEV_MODE=1"),
        ("vllm", (200, {"success": False}), "kept what it remembers"),
    ):
        with fake_server(lambda path, body, answer=answer: answer) as (url, _):
            engine = RemoteEngine(url, str(tmp_path), server, "m")  # type: ignore[arg-type]
            with pytest.raises(EngineError, match=match):
                engine.update("1-a", write)


def test_completions_from_other_weights_are_refused(network: Any) -> None:
    """As from a server that was started anew: it would give off-policy samples without a word."""
    told: dict[str, Any] = {}
    with fake_server(lambda path, body: (200, {**choices(body), **told})) as (url, _):
        engine = RemoteEngine(url, "w", model="m")
        generate(engine, network)
        engine.version = "12-abc"
        for version in (None, "8-abc"):
            told["weights_version"] = version
            with pytest.raises(
                EngineError, match=f"come from the weights {version!r}, the trainer handed over '12-abc'"
            ):
                generate(engine, network)
        told["weights_version"] = "12-abc"
        generate(engine, network)
