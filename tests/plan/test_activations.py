"""What the formulas say is kept for the backward pass against what autograd really keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lit_palm.models import half
from lit_palm.models.logprobs import TokenLogProbs
from lit_palm.models.palm import PaLMConfig
from lit_palm.optim import Adafactor
from lit_palm.plan.activations import block_bytes, head_bytes, network_bytes
from lit_palm.plan.job import NetworkShape
from lit_palm.plan.optimizers import optimizer_cost
from lit_palm.plan.reading import PRECISIONS

ROWS, LENGTH, LAYERS = 3, 40, 3


def saved_bytes(config: PaLMConfig, precision: str, masked: bool) -> int:
    """Bytes of all storages that the graph of a forward pass keeps, weights left out."""
    network = config.build().to({2: torch.bfloat16, 4: torch.float32}[PRECISIONS[precision].weight])
    tokens = torch.randint(0, config.vocab_size or 1, (ROWS, LENGTH))
    given: dict[str, Any] = {}
    if masked:
        given = {"documents": torch.zeros_like(tokens), "positions": torch.arange(LENGTH).expand(ROWS, LENGTH)}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=PRECISIONS[precision].autocast)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        network(tokens, head=TokenLogProbs(tokens, entropy=True), **given)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def predicted(config: PaLMConfig, precision: str, masked: bool) -> float:
    shape, kind = NetworkShape(config), PRECISIONS[precision]
    block = block_bytes(shape, kind, ROWS, LENGTH, masked=masked, cpu=True, casts_weights=kind.autocast)
    targets = ROWS * (LENGTH - 1)
    head = head_bytes(shape, kind, ROWS * LENGTH, targets, entropy=True, casts_weights=kind.autocast)
    each = block.residual + (0 if config.activation_checkpointing else block.saved)
    total = network_bytes(shape, kind, ROWS, LENGTH, masked) + LAYERS * each + block.residual
    return total + head.saved + head.cast


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize(
    "changes, masked",
    [
        ({}, False),
        ({}, True),
        ({"num_kv_heads": 2, "d_ffn": 100}, False),
        ({"num_kv_heads": 4}, False),
        ({"activation_checkpointing": True}, False),
        ({"xpos": True}, False),
        ({"qk_norm": "layer"}, False),
        ({"vocab_size": 2**24 // 100}, False),  # more targets than fit one chunk: log-probabilities are not kept
    ],
)
def test_what_autograd_keeps(
    precision: str, changes: dict[str, Any], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the formulas are for accelerators, which multiply 16-bit numbers and copies of weights, whatever this device does
    monkeypatch.setattr(half, "multiplies", lambda *_: True)
    monkeypatch.setattr(half, "quick", lambda *_: False)
    fields = {"vocab_size": 500, "d_model": 64, "num_layers": LAYERS, "num_heads": 4, "head_dim": 16, "max_length": 64}
    config = PaLMConfig(**{**fields, **changes})
    # a mask is not kept where blocks are recomputed, nor are RoPE's tables: a few kB
    slack = 0.05 if config.activation_checkpointing or changes.get("qk_norm") or masked else 0.01
    assert predicted(config, precision, masked) == pytest.approx(saved_bytes(config, precision, masked), rel=slack)


@pytest.mark.parametrize(
    "make, state",
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-3), 8),
        (lambda p: torch.optim.SGD(p, lr=1e-3), 0),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), 4),
        (lambda p: Adafactor(p), 8),
        (lambda p: Adafactor(p, beta1=None), 4),
        (lambda p: Adafactor(p, beta1=None, factored=True), 0.008),
        (lambda p: torch.optim.RMSprop(p, lr=1e-3), 4),
    ],
)
def test_optimiser_state(make: Any, state: float) -> None:
    assert optimizer_cost(make, 4).state == pytest.approx(state, rel=0.05)


def test_optimiser_temporaries_grow_with_all_parameters_only_in_multi_tensor_steps() -> None:
    cost = optimizer_cost(lambda p: torch.optim.AdamW(p, lr=1e-3), 4)
    assert cost.step_all == pytest.approx(1, rel=0.3) and 1 <= cost.step_largest <= 3
    assert optimizer_cost(lambda p: torch.optim.AdamW(p, lr=1e-3), 2).state == 4
    with pytest.raises(ValueError, match="LBFGS"):
        optimizer_cost(lambda p: torch.optim.LBFGS(p[0]["params"]), 4)
