"""Loss terms with weights of their own: accumulating gradients equals one large batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lit_palm import ByteTokenizer, DemonstrationData, LitLanguageModel, PaLMConfig
from lit_palm.objectives import Objective
from lit_palm.types import Experience, Loss, Output


class TokensPlusRows(Objective):
    """Mean over tokens plus a term that is a mean over rows: no single weight divides both."""

    kind: ClassVar = "language_model"

    def weight(self, experience: Experience) -> dict[str, Tensor]:
        mask = experience["loss_mask"]
        return {"tokens": mask.sum(), "rows": mask.any(1).sum()}

    def loss(self, output: Output, experience: Experience) -> Loss:
        logps = output.logps
        return Loss({"tokens": -logps.sum(), "rows": (logps.sum(1) ** 2).sum() * 1e-3})


def weights_after(data: Path, batch_size: int, accumulate: int) -> Tensor:
    torch.manual_seed(0)
    module = LitLanguageModel(
        PaLMConfig(d_model=16, num_layers=1, num_heads=2, head_dim=8, max_length=64),
        objective=TokensPlusRows(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05),
    )
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(module, DemonstrationData(train=str(data), batch_size=batch_size, tokenizer=ByteTokenizer()))
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulation_equals_one_large_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "rows.jsonl"
    # 22 rows of very unequal length: the last window of the epoch is a short one
    rows = [{"prompt": "a" * (i % 3), "completion": "b" * (1 + (i * 7) % 23)} for i in range(22)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    large = weights_after(data, batch_size=8, accumulate=1)
    small = weights_after(data, batch_size=8 // accumulate, accumulate=accumulate)
    # float32 sums in another order, over three steps
    torch.testing.assert_close(small, large, rtol=1e-5, atol=1e-6)
