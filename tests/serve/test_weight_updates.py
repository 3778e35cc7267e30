"""`lit-palm serve --weight_updates`: what it takes, what it refuses, and which weights a completion comes from."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lit_palm.models.weights import named_weights
from lit_palm.modules.handover import write_weights
from lit_palm.modules.weights import load_network
from lit_palm.rollout.remote_http import Client, EngineError
from lit_palm.serve.command import main
from tests.serve.conftest import Offline, Server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("updates")


@pytest.fixture(scope="module")
def server(start: Callable[..., Server], folder: Path) -> Iterator[Server]:
    yield start("--weight_updates", str(folder), "--max_batch_size", "4")


def changed(checkpoint: Path, by: float) -> dict[str, torch.Tensor]:
    """Weights that say something else."""
    network: Any = load_network(checkpoint)
    return {k: v.detach() + by * torch.randn(v.shape) for k, v in named_weights(network)}


def put(server: Server, path: Path | str, version: str | None = None) -> Any:
    body = {"model_path": str(path), "weight_version": version}
    return Client(server.url, None, 60, 0).post("/update_weights_from_disk", body)


def complete(server: Server, **fields: Any) -> Any:
    body = {
        "model": server.model,
        "prompt": [70, 71, 72],
        "max_tokens": 6,
        "seed": 3,
        "return_token_ids": True,
        **fields,
    }
    return Client(server.url, None, 60, 0).post("/v1/completions", body)


def ids(answer: Any) -> list[int]:
    return list(answer["choices"][0]["token_ids"])


def test_new_weights_are_taken_whole(server: Server, checkpoint: Path, folder: Path, offline: Offline) -> None:
    torch.manual_seed(0)
    new = changed(checkpoint, 0.5)
    write_weights(str(folder / "1-a"), "lit-palm", offline.network.config, new, offline.tokenizer)
    before = complete(server)
    assert (
        before["weights_version"] is None
        and ids(before) == offline.generate([70, 71, 72], 3, max_new_tokens=6).completions[0].tolist()
    )
    assert put(server, folder / "1-a", "1-a") == {"success": True, "message": "", "weight_version": "1-a"}
    other = Offline(checkpoint)
    other.network.load_state_dict(new)
    after = complete(server)
    expected = other.generate([70, 71, 72], 3, max_new_tokens=6).completions[0].tolist()
    assert after["weights_version"] == "1-a" and ids(after) == expected != ids(before)
    (model,) = Client(server.url, None, 60, 0).get("/v1/models")["data"]
    assert model["weights_version"] == "1-a"


def test_row_seeds_are_those_of_the_engine(server: Server) -> None:
    from lit_palm.rollout.sampling import row_seeds

    seeds = [int(s) for s in row_seeds(3, 0, torch.arange(2))]
    one = complete(server, n=2)
    body = {"seed": None, "row_seeds": seeds, "logprobs": 0}
    two = complete(server, n=2, **body)
    assert [c["token_ids"] for c in one["choices"]] == [c["token_ids"] for c in two["choices"]]
    # every id has its log-probability, EOS too
    assert all(len(c["token_ids"]) == len(c["logprobs"]["token_logprobs"]) for c in two["choices"])
    with pytest.raises(EngineError, match="1 seeds for 2 completions"):
        complete(server, n=2, seed=None, row_seeds=seeds[:1])
    with pytest.raises(EngineError, match="not both"):
        complete(server, row_seeds=seeds[:1])


def test_what_does_not_fit_is_refused_and_nothing_changes(
    server: Server, checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    before = ids(complete(server))
    good = changed(checkpoint, 0.5)
    name = "layers.0.attn_out.weight"

    def lay(place: str, **files: dict[str, torch.Tensor]) -> Path:
        (folder / place).mkdir()
        for file, tensors in files.items():
            save_file(tensors, folder / place / f"{file}.safetensors")
        return folder / place

    (folder / "empty").mkdir()
    (folder / "torn").mkdir()
    (folder / "torn" / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"{}")
    (folder / "link").symlink_to(lay_outside(tmp_path, good))
    bad: list[tuple[Path | str, str]] = [
        (lay("shape", a={**good, name: torch.zeros(3, 3)}), rf"HTTP 400.*{name} has the shape \[3, 3\]"),
        (lay("lacks", a={k: v for k, v in good.items() if k != name}), f"HTTP 400.*lacks {name}"),
        (lay("unknown", a={**good, "other": torch.zeros(1)}), "HTTP 400.*other is no weight"),
        (lay("twice", a=good, b={name: good[name]}), f"HTTP 400.*{name} is in several of its"),
        (folder / "empty", "HTTP 400.*no safetensors"),
        (folder / "torn", "HTTP 400.*is cut short"),
        (folder / "nowhere", "HTTP 400.*no safetensors"),
        (tmp_path / "outside", "HTTP 403.*below"),
        (folder / "link", "HTTP 403.*below"),
        (folder / ".." / "outside", "HTTP 403.*below"),
        (folder, "HTTP 403.*below"),
        ("1-a", "HTTP 403.*below"),
    ]
    for path, told in bad:
        with pytest.raises(EngineError, match=told):
            put(server, path, "x")
    assert ids(complete(server)) == before
    for wrong in ({"model_path": 3}, {"model_path": "x", "load_format": "pt"}, {"model_path": "x", "run": "y"}):
        with pytest.raises(EngineError, match="HTTP 400"):
            Client(server.url, None, 60, 0).post("/update_weights_from_disk", wrong)


def lay_outside(place: Path, weights: dict[str, torch.Tensor]) -> Path:
    outside = place / "outside"
    outside.mkdir()
    save_file(weights, outside / "model.safetensors")
    return outside


def test_rows_under_way_end_on_the_weights_they_began_with(
    server: Server, checkpoint: Path, folder: Path, offline: Offline
) -> None:
    first, second = changed(checkpoint, 0.3), changed(checkpoint, 0.3)
    config, tokenizer = offline.network.config, offline.tokenizer
    for version, new in (("2-a", first), ("3-a", second)):
        write_weights(str(folder / version), "lit-palm", config, new, tokenizer)
    put(server, folder / "2-a", "2-a")
    answers: dict[str, Any] = {}
    fields: dict[str, Any] = {"max_tokens": 200, "min_tokens": 200, "n": 4}

    def ask(key: str) -> None:
        answers[key] = complete(server, **fields)

    early = threading.Thread(target=ask, args=("early",))
    early.start()
    wait_until_busy(server)
    update = threading.Thread(target=put, args=(server, folder / "3-a", "3-a"))
    update.start()
    update.join(60), early.join(60)
    ask("late")
    assert answers["early"]["weights_version"] == "2-a" and answers["late"]["weights_version"] == "3-a"
    for key, new in (("early", first), ("late", second)):
        other = Offline(checkpoint)
        other.network.load_state_dict(new)
        expected = other.generate([70, 71, 72], 3, count=4, max_new_tokens=200, min_new_tokens=200)
        assert [c["token_ids"] for c in answers[key]["choices"]] == [c.tolist() for c in expected.completions]


def wait_until_busy(server: Server) -> None:
    """Until a stream of its own has had a token: what was asked for before it is under way too."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = {"model": server.model, "prompt": [70], "max_tokens": 1, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    connection.getresponse().read(1)
    connection.close()


def test_it_is_off_unless_asked_for(start: Callable[..., Server], folder: Path) -> None:
    plain = start()
    with pytest.raises(EngineError, match="HTTP 404"):
        put(plain, folder / "1-a", "1-a")
    assert "weights_version" not in complete(plain)


def test_it_is_for_this_machine_or_needs_a_key(checkpoint: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="give --api_key"):
        main([str(checkpoint), "--weight_updates", str(folder), "--host", "0.0.0.0"])
    (folder / "file").touch()
    with pytest.raises(ValueError, match="is no folder"):
        main([str(checkpoint), "--weight_updates", str(folder / "file")])
