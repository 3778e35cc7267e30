"""What the tests of remote engines share: a fine-tuned start, the command line that trains against a server, fakes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_palm.callbacks import LastCheckpoint
from lit_palm.data.tokenizers import ByteTokenizer
from tests.support import config, language_model, sentence, text_data, trainer, write_jsonl


def start_checkpoint(folder: Path, **sizes: Any) -> Path:
    """A byte-level language model that a policy starts from."""
    run = trainer(folder, callbacks=[LastCheckpoint(str(folder))], max_steps=1)
    run.fit(language_model(network=config(**sizes)), datamodule=text_data(folder / "data", tokenizer=ByteTokenizer()))
    return folder / "last.ckpt"


def write_run(folder: Path, network: Path, engine: dict[str, Any] | None, **changes: Any) -> Path:
    """A configuration of four PPO steps a collection; changes are of the model's sections or the trainer's."""
    source = write_jsonl(folder / "prompts.jsonl", [{"prompt": sentence(i)[: 1 + i % 9]} for i in range(10)])
    model: dict[str, Any] = {
        "network": str(network),
        "objective": {"class_path": "PPO", "init_args": {"kl_coef": 0.1}},
        "rewards": [{"class_path": "PythonReward", "init_args": {"function": "tests.support.lower_case"}}],
        "rollout": {"num_prompts": 8, "passes": 2, "minibatch_size": 4, **changes.pop("rollout", {})},
        "sampling": {"max_new_tokens": 8},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
        **changes.pop("model", {}),
    }
    if engine is not None:
        model["engine"] = engine
    callbacks = [{"class_path": "lit_palm.callbacks.LastCheckpoint", "init_args": {"dirpath": str(folder / "run")}}]
    content = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
            "enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": str(folder),
            "max_epochs": 3, "log_every_n_steps": 1, "callbacks": callbacks, **changes.pop("trainer", {}),
        },
        "model": {"class_path": "LitPolicy", "init_args": model},
        "data": {"class_path": "PromptData", "init_args": {"train": source}},
    }  # fmt: skip
    assert not changes
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def remote(url: str, folder: Path, **options: Any) -> dict[str, Any]:
    """The engine's entry in YAML."""
    arguments = {"url": f"{url}/v1", "weights_dir": str(folder), "retries": 1, "timeout": 60, **options}
    return {"class_path": "RemoteEngine", "init_args": arguments}


def trained(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's newest checkpoint."""
    state: dict[str, torch.Tensor] = torch.load(folder / "run" / "last.ckpt", weights_only=True)["state_dict"]
    return state


Answer = Callable[[str, dict[str, Any]], tuple[int, Any]]


@contextmanager
def fake_server(answer: Answer) -> Iterator[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """A real HTTP server that answers as told; its address, and the requests it got as (path, body)."""
    seen: list[tuple[str, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({})

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any]) -> None:
            seen.append((self.path, {**body, "key": self.headers.get("Authorization")}))
            status, found = answer(self.path, body)
            text = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
