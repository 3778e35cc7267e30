"""Our training step, what it takes at the machine's peak, and what it holds in memory."""

from __future__ import annotations

from typing import Any

import torch

from lit_palm import LitLanguageModel, TextData
from lit_palm.models import TokenLogProbs
from lit_palm.models.hardware import measure_peak_flops
from lit_palm.objectives import LanguageModeling
from lit_palm.types import Experience, Loss, Output
from tests.benchmarks.inputs import Size, lengths_of_documents, parameters, token_ids
from tests.benchmarks.memory import Peak
from tests.benchmarks.ours.running import config, stepwise, written
from tests.benchmarks.worker import Work

HOST = torch.Generator().device


class Steady(torch.optim.AdamW):
    """AdamW at a learning rate of 0: all the work, and the loss of a document stays what it is."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.0, weight_decay=0.0)


def train(size: dict[str, int], rows: int, length: int, precision: str) -> Work:
    """A step of `LitLanguageModel` under the Trainer, with its default optimiser and all that it logs."""

    def build() -> tuple[Any, Any]:
        documents = token_ids(0, 4 * rows, length - 2).tolist()  # BOS and EOS are added
        data = TextData(
            sequence_length=length, pack=False, train=written([{"tokens": ids} for ids in documents]),
            batch_size=rows, tokenizer="bytes",
        )  # fmt: skip
        return LitLanguageModel(config(Size(**size))), data

    step = stepwise(build, precision)

    def run() -> dict[str, Any]:
        step()
        return {"tokens": rows * length}

    run.close = step.close  # type: ignore[attr-defined]
    return run


def matmul_bound(size: dict[str, int], rows: int, length: int, precision: str) -> Work:
    """The seconds that a step's matrix products would take at the fastest rate measured here, now.

    6 floating-point operations a weight and token, and causal attention's (Chowdhery et al. 2022, appendix B, of which
    half lies above the diagonal).
    """
    shape = Size(**size)
    attention = 6 * shape.num_layers * shape.d_model * length
    flops = rows * length * (6 * parameters(shape) + attention)
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32

    def run() -> dict[str, Any]:
        peak = measure_peak_flops(HOST, dtype)
        return {"cost": flops / peak, "peak_flops": peak, "flops": flops}

    return run


class Counted(LanguageModeling):
    """Keeps the sum of what was lost, without waiting for it."""

    def __init__(self) -> None:
        super().__init__()
        self.nll = self.count = torch.zeros(())

    def loss(self, output: Output, experience: Experience) -> Loss:
        result = super().loss(output, experience)
        nll, count = result.metrics["nll"]
        self.nll, self.count = self.nll + nll.double(), self.count + count
        return result


def documents(
    size: dict[str, int], count: int, low: int, high: int, rows: int, packed: bool, precision: str = "32-true"
) -> Work:
    """One pass over documents of log-normal lengths, in windows of the longest or one a row, padded to the longest.

    Args:
        size: the network.
        count: documents.
        low: tokens of the shortest, BOS and EOS included.
        high: of the longest, and of a window.
        rows: of a batch.
        packed: several documents in a window; off: one in each row, batches at random.
        precision: of the Trainer.
    """
    lengths = lengths_of_documents(count, low, high)
    objective, steps = Counted(), 0

    def build() -> tuple[Any, Any]:
        nonlocal steps
        source = written([{"tokens": token_ids(i, 1, n - 2)[0].tolist()} for i, n in enumerate(lengths)])
        data = TextData(sequence_length=high, pack=packed, train=source, batch_size=rows, tokenizer="bytes")
        data.setup("fit")
        data.trainer = None
        steps = len(data.train_dataloader())
        return LitLanguageModel(config(Size(**size)), objective=objective, optimizer=Steady), data

    step = stepwise(build, precision)
    begun = False

    def run() -> dict[str, Any]:
        nonlocal begun
        objective.nll = objective.count = torch.zeros(())
        if not begun:
            begun = True
            step()
        for _ in range(steps - int(objective.count > 0)):
            step()
        loss = float(objective.nll / objective.count)
        return {"tokens": sum(lengths), "steps": steps, "loss": loss}

    run.close = step.close  # type: ignore[attr-defined]
    return run


def update_memory(size: dict[str, int], rows: int, length: int) -> Work:
    """Peak bytes of PPO-like updates in this process, without what the embedding and its gradient and moments take."""
    peak = Peak()

    def run() -> dict[str, Any]:
        torch.manual_seed(0)
        network = config(Size(**size)).build()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        for _ in range(2):  # the second has the optimiser's state
            tokens = torch.randint(1, network.config.vocab_size, (rows, length))
            out = network(tokens, head=TokenLogProbs(tokens, entropy=True))
            ratio = (out["logps"] - out["logps"].detach()).exp()
            (-ratio.clamp(0.8, 1.2).sum() - 0.01 * out["entropy"].sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        weight = network.embedding.weight
        return {"cost": max(1, peak.bytes() - 4 * weight.numel() * weight.element_size())}

    return run


def train_memory(size: dict[str, int], rows: int, length: int, steps: int = 2) -> Work:
    """Peak bytes of steps of a language model above what the imports took."""
    peak = Peak()

    def run() -> dict[str, Any]:
        step = train(size, rows, length, "32-true")
        for _ in range(steps):
            step()
        return {"cost": peak.bytes()}

    return run
