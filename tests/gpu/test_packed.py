"""For the day a GPU is there: packed documents by FlexAttention's kernels are those under the mask, in less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lit_palm.models import PaLMConfig, TokenLogProbs
from lit_palm.models.flex import why_not

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no GPU here"),
]


def device() -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return found


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_give_what_the_mask_gives(dtype: torch.dtype, head_dim: int) -> None:
    for kv_heads in (1, 4):
        assert why_not(device(), dtype, 4, kv_heads, head_dim) is None


@pytest.mark.parametrize("settings", [{}, {"xpos": True}, {"qk_norm": "layer"}, {"activation_checkpointing": True}])
def test_a_network_gives_the_same_with_a_mask(settings: dict[str, Any]) -> None:
    """Log-probabilities and gradients in float32: 1e-3; the peak of memory is below that with the mask."""
    torch.manual_seed(0)
    fields = {"vocab_size": 300, "d_model": 256, "num_layers": 2, "num_heads": 4, "head_dim": 64, **settings}
    network = PaLMConfig(**fields, attention="flex").build().to(device())
    twin = copy.deepcopy(network)
    twin.config.attention = "sdpa"
    rows = (torch.arange(2000) // 170).expand(4, 2000).to(device())
    tokens, results, peaks = torch.randint(0, 300, rows.shape, device=device()), [], []
    for each in (network, twin):
        for _ in range(2):  # the first time it is compiled
            torch.accelerator.reset_peak_memory_stats()
            logps = each(tokens, documents=rows, head=TokenLogProbs(tokens))["logps"]
            gradients = torch.autograd.grad(logps.sum(), list(each.parameters()))
        results.append((logps, gradients))
        peaks.append(torch.accelerator.max_memory_allocated())
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)
    assert peaks[0] < peaks[1]
