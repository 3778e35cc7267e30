"""The YAML file and the README's run parse, and build what they name; comments give the defaults."""

from __future__ import annotations

import inspect
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lit_palm_ilql import ILQL, ILQLConfig

from lit_palm import LitLanguageModel, PaLMConfig
from lit_palm.cli import main

HERE = Path(__file__).parents[1]
README = (HERE / "README.md").read_text(encoding="utf-8")
FILE = HERE / "configs" / "ilql.yaml"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[LightningCLI]:
    """Command lines that were parsed and built, instead of run, beside a fine-tuned checkpoint."""
    found: list[LightningCLI] = []
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda cli, subcommand: found.append(cli))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    from lightning.pytorch import Trainer

    from lit_palm import DemonstrationData
    from lit_palm.callbacks import LastCheckpoint

    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "demos.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    module = LitLanguageModel(PaLMConfig(d_model=16, num_layers=1, num_heads=2, head_dim=8, max_length=64))
    last = LastCheckpoint("runs/finetune")
    run = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False, callbacks=[last])
    run.fit(module, DemonstrationData(train="demos.jsonl", tokenizer="bytes", batch_size=1))
    return found


def model_of(text: str) -> dict[str, Any]:
    arguments: dict[str, Any] = yaml.safe_load(text)["model"]["init_args"]
    return arguments


def test_the_file_builds_by_its_own_command(built: list[LightningCLI], capsys: pytest.CaptureFixture[str]) -> None:
    text = FILE.read_text(encoding="utf-8")
    shown = re.search(r"^#   lit-palm (fit .*)$", text, re.M)
    assert shown
    words = shlex.split(shown.group(1).replace("plugins/lit-palm-ilql/configs", str(FILE.parent)))
    assert main([*words, "--trainer.accelerator=cpu", "--trainer.logger=false"]) == 0, capsys.readouterr().err
    model = built[0].model
    arguments = model_of(text)
    assert type(model.objective) is ILQL and vars(model.objective) == vars(ILQL(**arguments["objective"]["init_args"]))
    assert model.network == ILQLConfig(**arguments["network"]["init_args"])


def test_the_comments_after_arguments_give_their_defaults() -> None:
    text = FILE.read_text(encoding="utf-8")
    shown = {name: yaml.safe_load(value) for name, value in re.findall(r"^ {8}(\w+): .*default ([\w.]+)\)", text, re.M)}
    arguments = model_of(text)
    defaults = {name: p.default for name, p in inspect.signature(ILQL).parameters.items()}
    assert set(arguments["objective"]["init_args"]) == set(defaults)
    network = {f.name: f.default for f in fields(ILQLConfig)}
    assert set(arguments["network"]["init_args"]) == set(network) - {"base"}
    assert shown == defaults | {k: v for k, v in network.items() if k not in ("start", "base")}
    for name in (*defaults, *network):
        assert f"`{name}`" in README or name in ("gamma", "tau", "beta", "base", "start"), name


def test_the_readmes_run_builds(built: list[LightningCLI], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    (tmp_path / "run.yaml").write_text(block, encoding="utf-8")
    assert main(["fit", "--config", "run.yaml", "--trainer.logger=false"]) == 0, capsys.readouterr().err
    (python,) = re.findall(r"```python\n(.*?)```", README, re.S)
    found: dict[str, Any] = {}
    exec(python, found)
    assert vars(built[0].model.objective) == vars(found["policy"].objective)
    assert built[0].model.network == found["policy"].network
