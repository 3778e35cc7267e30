"""`lit-palm export --push` against an endpoint on this machine that speaks what the hub's client speaks."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from lit_palm.cli import main
from tests.convert.checkpoints import palm, save


class Hub:
    """What was asked of it, and what is in its repositories."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.refuses = 0

    def answer(self, method: str, path: str, body: bytes, token: str | None) -> tuple[int, Any]:
        if token != "Bearer hf_secret":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user"}
        if self.refuses:
            return self.refuses, {"error": "You have read-only access"}
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, {"url": f"{huggingface_hub.constants.ENDPOINT}/me/aligned"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/models/me/aligned/preupload/main":
            wanted = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in wanted]}
        if path == "/api/models/me/aligned/commit/main":
            for line in filter(None, body.split(b"\n")):
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return 200, {
                "commitUrl": f"{huggingface_hub.constants.ENDPOINT}/me/aligned/commit/0",
                "commitOid": "0" * 40,
            }
        return 404, {"error": f"{method} {path}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            status, data = state.answer(self.command, path, body, self.headers.get("Authorization"))
            text = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = respond

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield state
    server.shutdown()
    server.server_close()


def private(made: dict[str, Any]) -> bool:
    """Client 2 says `visibility`, those before it `private`."""
    return made.get("visibility", "private" if made.get("private") else "public") == "private"


def test_a_folder_is_uploaded_whole_and_private(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "last.ckpt", {"policy": palm()})
    assert main(["export", str(path), str(tmp_path / "aligned"), "--push", "me/aligned"]) == 0
    assert hub.created[0]["name"] == "aligned" and private(hub.created[0])
    assert hub.files == {p.name: p.read_bytes() for p in (tmp_path / "aligned").iterdir()}
    assert "/me/aligned" in capsys.readouterr().err.splitlines()[-1]
    assert main(["export", str(path), str(tmp_path / "aligned"), "--push", "me/aligned", "--private", "false"]) == 0
    assert not private(hub.created[1])


def test_what_the_hub_refuses_is_one_line(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["export", str(save(tmp_path / "last.ckpt", {"policy": palm()})), str(tmp_path / "x"), "--push"]

    def error(repository: str) -> str:
        assert main([*arguments, repository]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("lit-palm: error: --push")
        return "\n".join(lines)

    assert "Repo id must" in error("a/b/c")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the hub did not take it" in error("me/aligned")
    monkeypatch.delenv("HF_TOKEN")
    assert error("me/aligned").endswith("nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN")
    assert not (tmp_path / "x").exists()  # all of this before any work
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.refuses = 403
    assert "403 Forbidden" in error("me/aligned") and (tmp_path / "x" / "config.json").exists()
