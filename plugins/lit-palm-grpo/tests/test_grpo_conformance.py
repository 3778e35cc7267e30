"""What lit_palm asks of every objective, asked of each variant by its own conformance kit."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from lit_palm_grpo import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO, ReinforcePlusPlus

from lit_palm.testing import ObjectiveChecks, ObjectiveConformance


class TestGRPO(ObjectiveConformance):
    """Also what trains: two processes, resuming, the command line. The variants run the same code there."""

    @pytest.fixture
    def objective(self) -> Any:
        return GRPO


class TestEveryOption(ObjectiveChecks):
    @pytest.fixture
    def objective(self) -> Any:
        lengths = {"max_completion_length": 64, "overlong_cache": 8, "mask_truncated_completions": True}
        costs = {"entropy_coef": 0.1, "missing_eos_penalty": 0.5}
        return functools.partial(GRPO, dual_clip=3.0, importance_cap=2.0, dynamic_sampling=True, **lengths, **costs)


class TestDrGRPO(ObjectiveChecks):
    @pytest.fixture
    def objective(self) -> Any:
        return DrGRPO


class TestRLOO(ObjectiveChecks):
    @pytest.fixture
    def objective(self) -> Any:
        return RLOO


class TestReinforcePlusPlus(ObjectiveChecks):
    completions_per_prompt = 1

    @pytest.fixture
    def objective(self) -> Any:
        return ReinforcePlusPlus


class TestDAPO(ObjectiveChecks):
    @pytest.fixture
    def objective(self) -> Any:
        return DAPO


class TestGSPO(ObjectiveChecks):
    @pytest.fixture
    def objective(self) -> Any:
        return GSPO


class TestCISPO(ObjectiveChecks):
    @pytest.fixture
    def objective(self) -> Any:
        return CISPO
