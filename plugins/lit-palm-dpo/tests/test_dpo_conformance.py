"""What lit_palm asks of every objective, asked of each class and each loss, as far as tensors alone can say."""

from __future__ import annotations

import functools
from typing import Any, get_args

import pytest
from lit_palm_dpo import CPO, DPO, KTO, ORPO, OnlineDPO, SimPO
from lit_palm_dpo.dpo import LossName

from lit_palm.testing import ObjectiveChecks

SMOOTHING: dict[str, Any] = {"exo_pair": {"label_smoothing": 0.01}, "robust": {"label_smoothing": 0.1}}
VARIANTS: list[dict[str, Any]] = [
    *[{"losses": name, **SMOOTHING.get(name, {})} for name in get_args(LossName)],
    {"losses": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    {"losses": ["ipo", "sft"], "divergence": "forward_kl"},
    {"divergence": "alpha", "alpha": 0.3, "label_smoothing": 0.1, "margin": True, "ld_alpha": 0.5},
    {"reference_free": True, "length_normalised": True},
]


class TestEveryLoss(ObjectiveChecks):
    @pytest.fixture(params=VARIANTS, ids=lambda options: str(options.get("losses", "options")))
    def objective(self, request: pytest.FixtureRequest) -> Any:
        return functools.partial(DPO, **request.param)


class TestRankings(ObjectiveChecks):
    data = "rankings"

    @pytest.fixture
    def objective(self) -> Any:
        return functools.partial(DPO, losses=["sigmoid", "sft"])


class TestSimPO(ObjectiveChecks):
    @pytest.fixture
    def objective(self) -> Any:
        return SimPO


class TestORPO(ObjectiveChecks):
    @pytest.fixture
    def objective(self) -> Any:
        return ORPO


class TestCPO(ObjectiveChecks):
    @pytest.fixture(params=["sigmoid", "hinge", "ipo", "simpo"])
    def objective(self, request: pytest.FixtureRequest) -> Any:
        return functools.partial(CPO, loss=request.param)


class TestKTO(ObjectiveChecks):
    data = "unpaired"
    statistics = (*ObjectiveChecks.statistics, "rewards/margins")  # a difference of means

    @pytest.fixture
    def objective(self) -> Any:
        return KTO


class TestUnpairedAPO(ObjectiveChecks):
    data = "unpaired"
    statistics = (*ObjectiveChecks.statistics, "rewards/margins")

    @pytest.fixture
    def objective(self) -> Any:
        return functools.partial(KTO, loss="apo_zero_unpaired", desirable_weight=1.3)


class TestOnlineDPO(ObjectiveChecks):
    ratio = None  # it needs `old_logps` to report the divergence

    @pytest.fixture
    def objective(self) -> Any:
        return OnlineDPO


class TestOnlineOptions(ObjectiveChecks):
    ratio = None

    @pytest.fixture
    def objective(self) -> Any:
        return functools.partial(OnlineDPO, missing_eos_penalty=0.5, losses=["ipo", "sft"], reference_free=True)
