"""A checkpoint to serve and talk to, and a server of it in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_palm.callbacks import LastCheckpoint
from lit_palm.data.tokenizers import ByteTokenizer, Tokenizer
from lit_palm.modules.checkpoint import load_checkpoint_tokenizer
from lit_palm.modules.weights import load_network
from lit_palm.rollout.engine import CachedEngine, Generation
from lit_palm.rollout.sampling import Sampling, row_seeds
from lit_palm.testing.processes import Program
from tests.support import config, language_model, text_data, trainer

TEMPLATE = """\
{%- for m in messages -%}
{%- if m.role not in ('user', 'assistant', 'system') %}{{ raise_exception('nobody is called ' ~ m.role) }}{% endif -%}
<{{ m.role[0] }}>{{ m.content }}{{ eos_token if m.role == 'assistant' }}
{%- endfor -%}
{{ '<a>' if add_generation_prompt }}"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level language model with a context of 256 tokens, named `tiny`; what it says means nothing."""
    return write_checkpoint(tmp_path_factory.mktemp("serve") / "tiny", d_model=32, num_layers=2, max_length=256)


def write_checkpoint(folder: Path, **sizes: Any) -> Path:
    """A byte-level language model with a chat template."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_PALM_CACHE", str(folder / "cache"))
        run = trainer(folder, callbacks=[LastCheckpoint(str(folder))], max_epochs=1)
        data = text_data(folder / "data", tokenizer=ByteTokenizer(chat_template=TEMPLATE))
        run.fit(language_model(network=config(**sizes)), datamodule=data)
    return folder / "last.ckpt"


class Offline:
    """What the same checkpoint says without a server."""

    def __init__(self, path: Path) -> None:
        network = load_network(path)
        self.network: Any = network.eval()
        self.tokenizer: Tokenizer = load_checkpoint_tokenizer(path)

    def ids(self, text: str) -> list[int]:
        """Of a text prompt."""
        return self.tokenizer.prefix + self.tokenizer.encode(text)

    def generate(self, prompt: str | list[int], seed: int, count: int = 1, **sampling: Any) -> Generation:
        """As `lit-palm generate --seed SEED` with so many equal prompts."""
        ids = torch.tensor(self.ids(prompt) if isinstance(prompt, str) else prompt)
        seeds: Tensor = row_seeds(seed, 0, torch.arange(count))
        return CachedEngine().generate(
            self.network,
            [ids] * count,
            Sampling(**sampling),
            seeds,
            pad_id=self.tokenizer.pad_id,
            eos_id=self.tokenizer.eos_id,
            decode=self.tokenizer.decode,
        )

    def text(self, prompt: str | list[int], seed: int, **sampling: Any) -> str:
        """The first completion as text."""
        return self.tokenizer.decode(self.generate(prompt, seed, **sampling).completions[0].tolist())


@pytest.fixture(scope="session")
def offline(checkpoint: Path) -> Offline:
    return Offline(checkpoint)


class Server:
    """`lit-palm serve` in a process of its own, on a port that was free."""

    def __init__(self, checkpoint: Path, *arguments: str, **environment: str) -> None:
        command = ["serve", str(checkpoint), "--port", "0", *arguments]
        output = Path(tempfile.mkdtemp(prefix="server-", dir=checkpoint.parent))
        self.process = Program("lit_palm", command, output, {**os.environ, "OMP_NUM_THREADS": "1", **environment})
        deadline = time.monotonic() + 120
        while (match := re.search(r"serving (\S+) at (http://\S+)/v1\b", "".join(self.log))) is None:
            ended = self.process.poll() is not None or time.monotonic() > deadline
            assert not ended, f"the server did not start: {''.join(self.log)}"
            time.sleep(0.02)
        self.model, self.url = match[1], match[2]
        self.port = int(self.url.rpartition(":")[2])

    @property
    def log(self) -> list[str]:
        """What it has said so far."""
        return self.process.stderr.splitlines(keepends=True)

    def client(self, **options: Any) -> Any:
        """The official client."""
        from openai import OpenAI

        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60, **options})

    def memory(self) -> int:
        """Bytes that the process has in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert match is not None
        return int(match[1]) * 1024

    def end(self, number: int = signal.SIGTERM, timeout: float = 30) -> int:
        """Stop it; the exit status."""
        os.kill(self.process.pid, number)
        return self.process.wait(timeout)

    def kill(self) -> None:
        self.process.kill()


@pytest.fixture(scope="module")
def start(checkpoint: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers and sees to it that none outlives the tests."""
    pytest.importorskip("litserve")
    running: list[Server] = []

    def begin(*arguments: str, served: Path = checkpoint, **environment: str) -> Server:
        running.append(Server(served, *arguments, **environment))
        return running[-1]

    yield begin
    for server in running:
        server.kill()


@pytest.fixture(scope="module")
def server(start: Callable[..., Server]) -> Server:
    """One with room for eight rows at once."""
    return start("--max_batch_size", "8", "--max_queue", "40", "--max_body", "20000")
