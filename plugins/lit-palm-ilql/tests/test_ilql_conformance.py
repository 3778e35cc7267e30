"""What lit_palm asks of every objective, with the network it comes with; and the same step when FSDP2 spreads that."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import yaml
from lit_palm_ilql import ILQL

from lit_palm import load_network
from lit_palm.testing import ObjectiveChecks, ObjectiveConformance
from lit_palm.testing.jobs import Job, command

NETWORK = {
    "class_path": "lit_palm_ilql.network.ILQLConfig",
    "init_args": {
        "base": {
            "class_path": "lit_palm.models.palm.PaLMConfig",
            "init_args": {"d_model": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "max_length": 64},
        },
        "alpha": 0.3,
        "sync_steps": 1,
    },
}


class TestILQL(ObjectiveConformance):
    data = "ratings"
    network = NETWORK

    @pytest.fixture
    def objective(self) -> Any:
        return functools.partial(ILQL, beta=0.5, reward_mean=0.5)

    def test_fsdp2_takes_the_step_of_one_process(self, objective: Any, tmp_path: Path) -> None:
        """Two processes, each with half of every weight, target heads too; 1e-3 of the way, as the kit allows."""
        job = Job(self, objective, tmp_path)
        config = job.config(2)
        config["trainer"]["strategy"] = {
            "class_path": "ModelParallelStrategy",
            "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
        }
        path = tmp_path / "sharded.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        command(["fit", "--config", str(path)], ILQL)
        one, many = job.fit(), load_network(tmp_path / "cli" / "last.ckpt").state_dict()
        start, end = ({k.removeprefix("networks.policy."): v for k, v in w.items()} for w in (one.start, one.weights))
        assert end.keys() == many.keys()
        for part in ("base.", "q_heads.", "target_q_heads.", "v_head."):
            names = [name for name in end if name.startswith(part)]
            moved = max(float((end[n] - start[n]).abs().max()) for n in names)
            apart = max(float((end[n] - many[n]).abs().max()) for n in names)
            assert moved > 1e-4 and apart < 1e-3 * moved, part


class TestVariants(ObjectiveChecks):
    @pytest.fixture(params=[{}, {"two_qs": False, "tau": 0.9}, {"beta": 4.0, "awac_scale": 0.5, "gamma": 1.0}], ids=str)
    def objective(self, request: pytest.FixtureRequest) -> Any:
        return functools.partial(ILQL, **request.param)


class TestPairs(TestVariants):
    data = "pairs"


class TestLabels(TestVariants):
    data = "unpaired"
