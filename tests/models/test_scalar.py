"""The scalar head: its initialisation, its two ways of pooling and its calibration, against plain arithmetic."""

from __future__ import annotations

import pytest
import torch

from lit_palm.models.base import ScalarNetwork
from lit_palm.models.palm import PaLMConfig

CONFIG = PaLMConfig(vocab_size=50, d_model=32, num_layers=2, num_heads=2, head_dim=16, max_length=32)


def raw_values(network: ScalarNetwork, tokens: torch.Tensor) -> torch.Tensor:
    hidden = network.trunk(tokens, head=lambda hidden, weight, scale: hidden)
    return hidden @ network.head.weight[0] + network.head.bias


def test_head_starts_small() -> None:
    torch.manual_seed(0)
    heads = torch.cat([ScalarNetwork(CONFIG.build()).head.weight.flatten() for _ in range(40)])
    # N(0, 1/sqrt(33)) over 1,280 draws: the standard deviation is known to 2%
    assert heads.std().item() == pytest.approx(33**-0.5, rel=0.08)


def test_mean_pooling_is_the_running_mean_and_causal() -> None:
    torch.manual_seed(0)
    network = ScalarNetwork(CONFIG.build(), pooling="mean")
    tokens = torch.randint(0, 50, (3, 9))
    values, raw = network(tokens), raw_values(network, tokens)
    for t in range(9):
        # float32 sums of nine terms
        torch.testing.assert_close(values[:, t], raw[:, : t + 1].mean(1), rtol=1e-5, atol=1e-6)
    longer = torch.cat([tokens, torch.randint(0, 50, (3, 4))], 1)  # what follows changes nothing
    torch.testing.assert_close(network(longer)[:, :9], values, rtol=1e-5, atol=1e-6)


def test_mean_pooling_does_not_count_left_padding() -> None:
    torch.manual_seed(0)
    network = ScalarNetwork(CONFIG.build(), pooling="mean")
    tokens = torch.randint(0, 50, (1, 6))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
    mask = torch.arange(9)[None] >= 3
    torch.testing.assert_close(network(padded, mask=mask)[:, 3:], network(tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_calibration_moves_scores_and_leaves_raw_ones(pooling: str) -> None:
    torch.manual_seed(0)
    network = ScalarNetwork(CONFIG.build(), pooling=pooling)  # type: ignore[arg-type]
    tokens = torch.randint(0, 50, (64, 5))
    before = network(tokens, calibrated=False)[:, -1]
    network.calibrate(before.mean(), before.std())
    after = network(tokens)[:, -1]
    assert after.mean().item() == pytest.approx(0, abs=1e-5) and after.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(network(tokens, calibrated=False)[:, -1], before)


def test_unknown_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="choose last or mean"):
        ScalarNetwork(CONFIG.build(), pooling="max")  # type: ignore[arg-type]
