"""What lit_palm asks of every objective where it takes training: accumulation, processes, resuming, command line.

One class of each kind: on pairs, on unpaired feedback, on its own samples. The others run the same code there.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from lit_palm_dpo import DPO, KTO, OnlineDPO

from lit_palm.testing import ObjectiveRuns


class TestDPO(ObjectiveRuns):
    """Two terms with weights of their own: the harder case for accumulation and processes."""

    @pytest.fixture
    def objective(self) -> Any:
        return functools.partial(DPO, losses=["sigmoid", "sft"], loss_weights=[1.0, 0.3])


class TestRunningShift(ObjectiveRuns):
    """What it carries from step to step."""

    @pytest.fixture
    def objective(self) -> Any:
        return functools.partial(DPO, losses="bco_pair", beta=0.5)

    test_two_processes_take_the_step_of_one = None
    test_command_line_gives_it_back = None


class TestKTO(ObjectiveRuns):
    data = "unpaired"

    @pytest.fixture
    def objective(self) -> Any:
        return KTO


class TestOnlineDPO(ObjectiveRuns):
    ratio = None  # it needs `old_logps` to report the divergence

    @pytest.fixture
    def objective(self) -> Any:
        return OnlineDPO
