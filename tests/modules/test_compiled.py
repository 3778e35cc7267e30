"""`model.compile`: the losses and checkpoints of a run without it, under every kind of training.

Runs are traced into graphs that torch then runs as they stand (`eager`), which takes seconds; one goes on to the
derivatives of graphs (`aot_eager`), one to machine code, and the slow ones do both.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from lit_palm.models import PaLMConfig, TokenLogProbs, compiled
from lit_palm.models.compiled import compile_blocks
from lit_palm.models.lora import LoRA
from lit_palm.rollout.sampling import Sampling
from tests.modules.test_strategies import check, processes
from tests.support import config, language_model, text_data, trainer

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def graphs_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def losses(folder: Path, **options: Any) -> tuple[Any, Any, list[float]]:
    """A run of six steps over packed rows."""
    seen: list[float] = []
    module = language_model(sampling=Sampling(max_new_tokens=8), **options)
    original = module.account
    module.account = lambda *args: seen.append(original(*args)) or seen[-1]
    run = trainer(folder, max_steps=6, max_epochs=-1)
    run.fit(module, datamodule=text_data(folder))
    return run, module, [float(loss.detach()) for loss in seen]


@pytest.mark.parametrize("settings", [{"xpos": True}, {"activation_checkpointing": True, "qk_norm": "l2"}])
def test_a_run_is_that_of_an_eager_one(settings: dict[str, Any], tmp_path: Path) -> None:
    network = config(num_layers=3, **settings)
    _, eager, expected = losses(tmp_path, network=copy.deepcopy(network))
    assert graphs() == 0
    _, module, got = losses(tmp_path, network=network, compile=True)
    assert got == pytest.approx(expected, rel=1e-4)
    assert 1 <= graphs() <= 4, "one for all blocks, with and without gradients"
    assert list(module.state_dict()) == list(eager.state_dict())
    assert module.complete(["ab", "c"]) == eager.complete(["ab", "c"])


def test_adapters_are_trained_compiled(tmp_path: Path) -> None:
    results = [losses(tmp_path, lora=LoRA(rank=2), compile=compile)[2] for compile in (False, True)]
    assert graphs() >= 1 and results[1] == pytest.approx(results[0], rel=1e-4)


def test_a_run_goes_on_with_and_without(tmp_path: Path) -> None:
    first = trainer(tmp_path, max_steps=3, max_epochs=-1)
    first.fit(language_model(compile=True), datamodule=text_data(tmp_path))
    first.save_checkpoint(tmp_path / "three.ckpt")
    ends = []
    for compile in (True, False):
        module = language_model(compile=compile)
        options = {"datamodule": text_data(tmp_path), "ckpt_path": str(tmp_path / "three.ckpt")}
        trainer(tmp_path, max_steps=6, max_epochs=-1).fit(module, **options)
        ends.append(module.state_dict())
    assert list(ends[0]) == list(ends[1])
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], **TOLERANCE)


def test_lengths_and_numbers_of_rows_need_no_new_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    network = PaLMConfig(vocab_size=30, d_model=48, num_layers=3, num_heads=3, head_dim=16).build()
    twin = copy.deepcopy(network)
    compile_blocks(network)
    for rows, length in ((2, 5), (3, 9), (4, 16), (7, 23)):
        tokens = torch.randint(0, 30, (rows, length))
        results = []
        for each in (network, twin):
            logps = each(tokens, head=TokenLogProbs(tokens))["logps"]
            results.append((logps, torch.autograd.grad(logps.sum(), list(each.parameters()))))
        torch.testing.assert_close(results[0], results[1], **TOLERANCE)
    assert 1 <= graphs() <= 2


def test_a_copy_has_weights_of_its_own() -> None:
    network = PaLMConfig(vocab_size=30, d_model=48, num_layers=1, num_heads=3, head_dim=16).build()
    compile_blocks(network)
    tokens = torch.randint(0, 30, (2, 5))
    expected = network(tokens).detach()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(twin(tokens), expected, **TOLERANCE)


def test_16_bit_networks() -> None:
    """Log-probabilities of about 3.4 nats within 0.1, compiled and not."""
    network = PaLMConfig(vocab_size=30, d_model=48, num_layers=2, num_heads=3, head_dim=16).build().bfloat16()
    twin = copy.deepcopy(network)
    compile_blocks(network)
    tokens = torch.randint(0, 30, (3, 16))
    got, expected = (each(tokens, head=TokenLogProbs(tokens))["logps"] for each in (network, twin))
    torch.testing.assert_close(got, expected, rtol=0, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded", "ddp"])
def test_two_processes_take_the_steps_of_an_eager_one(name: str, tmp_path: Path) -> None:
    """The short form, without derivatives of graphs, is among test_strategies.py's."""
    job = "language_model+compiled+6"
    check(job, processes(tmp_path, name, job, timeout=900), tmp_path / "one")


def test_the_last_step_is_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_code(monkeypatch, gradients=False)


@pytest.mark.slow
def test_so_is_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    machine_code(monkeypatch, gradients=True)


def machine_code(monkeypatch: pytest.MonkeyPatch, gradients: bool) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    network = PaLMConfig(vocab_size=10, d_model=16, num_layers=1, num_heads=1, head_dim=16, d_ffn=16).build()
    twin, tokens = copy.deepcopy(network), torch.randint(0, 10, (2, 5))
    compile_blocks(network)
    with torch.set_grad_enabled(gradients):
        found, expected = network(tokens), twin(tokens)
    torch.testing.assert_close(found, expected, **TOLERANCE)
    assert graphs() == 1
    if gradients:
        for one, other in zip(*(torch.autograd.grad(y.square().sum(), list(n.parameters()))
                                for y, n in ((found, network), (expected, twin))), strict=True):  # fmt: skip
            torch.testing.assert_close(one, other, **TOLERANCE)


def test_what_cannot_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"compiles the blocks of a PaLM, of which Linear has none"):
        compile_blocks(torch.nn.Linear(2, 2))
    monkeypatch.setattr(compiled, "BACKEND", "inductor")

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match=r"model.compile: torch.compile needs a C\+\+ compiler"):
        compile_blocks(PaLMConfig(vocab_size=10).build())
