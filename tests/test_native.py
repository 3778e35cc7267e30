"""Compiling where it runs: what fails, who compiles at once, whose code is run, and every processor's flags."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm import native
from lit_palm.models import PaLMConfig
from lit_palm.native import compiled, find_compiler

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
SOURCES = sorted(Path(native.__file__).parent.glob("*.cpp"))
SOURCE = "swiglu.cpp"


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was compiled is looked for again, before and after."""
    compiled.cache_clear()
    yield
    compiled.cache_clear()


@pytest.mark.usefixtures("forgotten")
def test_a_compiler_that_fails_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And the network computes on, without."""
    broken = tmp_path / "compiler"
    broken.write_text("#!/bin/sh\necho no such flag >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    if find_compiler() is None:
        pytest.skip("nothing is compiled for this processor")
    network = PaLMConfig(vocab_size=20, d_model=32, num_layers=1, num_heads=2, head_dim=32).build()
    with pytest.warns(UserWarning) as warned:
        assert network(torch.ones(1, 4, dtype=torch.long)).isfinite().all()
    said = [str(warning.message) for warning in warned]
    assert any("causal.cpp could not be compiled" in text and "no such flag" in text for text in said), said
    assert list((tmp_path / "cache" / "native").iterdir()) == []


@needs_compiler
@pytest.mark.usefixtures("forgotten")
def test_a_folder_that_cannot_be_written_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="could not be compiled.*file"):
        assert compiled(SOURCE) is None


@needs_compiler
@pytest.mark.usefixtures("forgotten")
def test_a_file_that_is_no_library_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What another program has written there; the file is named."""
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "whole"))
    assert compiled(SOURCE) is not None
    (whole,) = (tmp_path / "whole" / "native").iterdir()
    made = tmp_path / "other" / "native" / whole.name
    made.parent.mkdir(parents=True)
    made.write_bytes(b"no library")
    compiled.cache_clear()
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "other"))
    with pytest.warns(UserWarning, match=made.name):
        assert compiled(SOURCE) is None


@needs_compiler
@pytest.mark.usefixtures("forgotten")
def test_code_of_somebody_else_s_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path))
    assert compiled(SOURCE) is not None
    compiled.cache_clear()
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.warns(UserWarning, match="belongs to another user.*LIT_PALM_CACHE"):
        assert compiled(SOURCE) is None


def _compile_in(folder: str, barrier: Any) -> None:
    os.environ["LIT_PALM_CACHE"] = folder
    barrier.wait()
    assert compiled(SOURCE) is not None


@needs_compiler
def test_several_processes_compile_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    processes = [context.Process(target=_compile_in, args=(str(tmp_path), barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".so"]


@needs_compiler
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("processor", native.VECTORS)
def test_all_of_it_compiles_without_a_warning(processor: str, source: Path, tmp_path: Path) -> None:
    """For every processor; what other tests run is that of this one."""
    compiler = find_compiler()
    assert compiler is not None
    flags = [*native.FLAGS, "-Wall", "-Wextra", "-Werror", *native.VECTORS[processor]]
    subprocess.run([compiler, *flags, str(source), "-o", str(tmp_path / "made")], check=True)


@needs_compiler
def test_processors_of_both_kinds_give_the_same(tmp_path: Path) -> None:
    """Log-probabilities of decoding and training with AVX2 alone, where this processor has AVX-512: 2e-5 nats."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has AVX2 alone")
    program = """
import torch
from lit_palm.models import PaLMConfig, TokenLogProbs
from lit_palm.models.decoding import Decoding, decoding_form
torch.manual_seed(0)
network = PaLMConfig(vocab_size=50, d_model=64, num_layers=2, num_heads=4, head_dim=32).build()
tokens = torch.randint(0, 50, (3, 40))
out = network(tokens, head=TokenLogProbs(tokens))["logps"]
out.sum().backward()
grads = torch.cat([p.grad.flatten() for p in network.parameters()])
with torch.no_grad():
    cache = network.eval().new_cache(3, 40)
    network(tokens[:, :30], cache=cache)
    decoded = decoding_form(network, Decoding())(tokens[:, 30:31], cache=cache)
torch.save((out.detach(), grads, decoded), {!r})
"""
    found = []
    for capability in ("avx512", "avx2"):
        made = tmp_path / capability
        command = [native.sys.executable, "-c", program.replace("{!r}", repr(str(made)))]
        subprocess.run(command, check=True, env={**os.environ, "ATEN_CPU_CAPABILITY": capability})
        found.append(torch.load(made, weights_only=True))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
