"""llama.cpp runs an exported GGUF file with the same greedy text: the slow proof, since it is built from source.

`make proofs` runs it. It makes a virtual environment of its own and installs `llama-cpp-python` there, which takes some
five minutes and a C++ compiler; LIT_PALM_LLAMA_CPP_PYTHON names a Python that has it already. What the file holds is
tested in test_gguf.py, in the normal run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm.cli import main
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.sampling import Sampling
from tests.convert.checkpoints import palm, save, texts, tokenizers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python with llama-cpp-python."""
    ready = os.environ.get("LIT_PALM_LLAMA_CPP_PYTHON")
    if ready:
        return ready
    assert shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"), "llama.cpp is built from source"
    folder = tmp_path_factory.mktemp("llama_cpp")
    venv.create(folder, with_pip=True)
    made = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    command = [str(made), "-m", "pip", "install", "--quiet", "llama-cpp-python>=0.3", "numpy"]
    subprocess.run(command, check=True, timeout=3600)
    return str(made)


def ask(python: str, model: Path, request: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).with_name("llama_cpp_side.py")
    done = subprocess.run(
        [python, str(script), str(model)], input=json.dumps(request), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


SHAPES: dict[str, dict[str, Any]] = {
    "multi-query": {"num_layers": 3},
    "grouped": {"num_kv_heads": 2, "rope_theta": 500.0, "logit_scale": 0.3, "d_ffn": 64},
    "64 blocks with norms": {"num_layers": 64, "num_kv_heads": 4, "qk_norm": "layer"},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_writes_the_same_text(python: str, shape: str, tmp_path: Path) -> None:
    network = palm(**SHAPES[shape])
    path = save(tmp_path / "last.ckpt", {"policy": network})
    assert main(["export", str(path), str(tmp_path / "m.gguf"), "--format", "gguf"]) == 0
    prompts = torch.randint(0, 256, (4, 12), generator=torch.Generator().manual_seed(3))
    answer = ask(python, tmp_path / "m.gguf", {"texts": [], "prompts": prompts.tolist(), "new": 64})
    with torch.no_grad():
        logits = network(prompts)[:, -1]
    # float32 on both sides, in other orders
    assert (torch.tensor(answer["logits"]) - logits).abs().max() < 1e-4 * logits.abs().max()
    ours = CachedEngine().generate(
        network, list(prompts), Sampling(temperature=0, max_new_tokens=64), torch.arange(4), pad_id=256, eos_id=9999
    )
    assert answer["greedy"] == [row.tolist() for row in ours.completions]


@pytest.mark.parametrize("kind", ["bytes", "bpe", "hf", "hf, begins"])
def test_llama_cpp_reads_the_same_ids(python: str, kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers()[kind]
    path = save(tmp_path / "last.ckpt", {"policy": palm()}, tokenizer)
    assert main(["export", str(path), str(tmp_path / "m.gguf"), "--format", "gguf"]) == 0
    # an empty text is left out: llama-cpp-python gives it no begin token
    some = [*texts(), " ", "12345 678", "naïve 中文 ½ x²", "a\tb\r\n\n  c", "<eos> is typed", "it's we'll I'M"]
    answer = ask(python, tmp_path / "m.gguf", {"texts": some, "prompts": [], "new": 0})
    assert answer["ids"] == [tokenizer.prefix + tokenizer.encode(text) for text in some]
    assert answer["begins"] == str(tokenizer.bos_id is not None).lower()
    assert "generation" not in (answer["template"] or "").replace("add_generation_prompt", "")
