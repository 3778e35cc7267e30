"""ILQL finds what imitation does not: trlX's random walks, through data modules, the Trainer and a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ilql_walks import NODES, Graph, write
from lightning.pytorch import Trainer
from lit_palm_ilql import ILQL, ILQLConfig

from lit_palm import LitPolicy, PaLMConfig, PreferenceData, PromptData, PythonReward, Sampling
from lit_palm.callbacks import LastCheckpoint


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "log_every_n_steps": 1,
        "enable_model_summary": False, "num_sanity_val_steps": 0,
    }  # fmt: skip
    return Trainer(default_root_dir=str(folder), **{**quiet, **options})


def test_the_shortest_way_is_put_together_from_random_walks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 random walks are rated .77 on average; imitation comes to .62, decoding by values to .83 and .98."""
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    graph = Graph()
    walks = [graph.walk() for _ in range(1000)]
    ratings = [graph.optimality(walk) for walk in walks]
    rows = [{"prompt": w[:1], "completion": w[1:], "rating": r} for w, r in zip(walks, ratings, strict=True)]
    data = PreferenceData(train=write(tmp_path / "walks.jsonl", rows), tokenizer="bytes", batch_size=100)
    starts = [{"prompt": chr(ord("a") + node)} for node in range(1, NODES) for _ in range(8)]
    prompts = write(tmp_path / "starts.jsonl", starts)

    torch.manual_seed(0)
    base = PaLMConfig(d_model=48, num_layers=2, num_heads=3, head_dim=16, max_length=32)
    reward = PythonReward(graph.score, name="optimality")
    sampling = Sampling(max_new_tokens=12)
    module = LitPolicy(
        ILQLConfig(base=base, alpha=0.05, sync_steps=1),
        ILQL(reward_mean=float(np.mean(ratings)), reward_std=float(np.std(ratings))),
        rewards=[reward],
        sampling=sampling,
        optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    )
    last = LastCheckpoint(str(tmp_path))
    trainer(tmp_path, max_steps=150, gradient_clip_val=1.0, callbacks=[last]).fit(module, datamodule=data)

    found = {}
    for beta in (0.0, 1.0, 8.0):
        again = LitPolicy(
            str(tmp_path / "last.ckpt"), ILQL(), [reward], overrides={"decode_beta": beta}, sampling=sampling
        )
        held = PromptData(validation=prompts, batch_size=80, train=prompts)
        found[beta] = trainer(tmp_path).validate(again, datamodule=held, verbose=False)[0]["val/reward"]
    imitated = float(np.mean(ratings))
    assert found[0.0] < imitated + 0.1, found
    assert found[8.0] > found[1.0] > found[0.0] + 0.05, found
    assert found[8.0] > 0.9 and found[8.0] > found[0.0] + 0.25, found
