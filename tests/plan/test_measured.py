"""Predicted peak memory against that of a real `fit` on this machine; `python -m tests.plan.measuring` prints all."""

from __future__ import annotations

import pytest

from tests.plan.measuring import NAMES, measure

pytestmark = pytest.mark.skipif(
    not __import__("os").path.exists("/proc/self/clear_refs"), reason="peaks are read from Linux' /proc"
)


@pytest.mark.parametrize("name", ["lm-small", "ppo-small-checkpointed"])
def test_small(name: str) -> None:
    found = measure(name)
    assert found.measured > 100e6, "too little to tell a prediction from noise"
    assert found.ratio == pytest.approx(1, abs=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NAMES, "lm-vocab", "lm-vocab-checkpointed", "lm-small-bf16", "lm-small-accumulated"])
def test_every_kind(name: str) -> None:
    assert measure(name).ratio == pytest.approx(1, abs=0.15)
