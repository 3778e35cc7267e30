"""The comparison of a PPO iteration runs, in its short form; what it measures is read by people, never gated on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import ppo


def test_our_iteration_tells_its_parts(tmp_path: Path) -> None:
    found = ppo.our_ppo(ppo.SHORT, "32-true", tmp_path)
    assert {"time/rollout_s", "time/score_s", "time/reference_s", "time/value_s", "time/update_s"} <= found.keys()
    assert 0 < found["time/collect_s"] + found["time/update_s"] < 1.2 * found["seconds"]


def test_the_peer_takes_the_same_number_of_steps() -> None:
    pytest.importorskip("palm_rlhf_pytorch")
    found = ppo.peer_ppo(ppo.SHORT)
    assert found["steps"] == ppo.SHORT.passes * ppo.SHORT.prompts / ppo.SHORT.minibatch
    assert found["seconds"] == found["rollout_s"] + found["update_s"] > 0
    scaled = ppo.peer_ppo(ppo.SHORT, sampled=2)
    assert scaled["sampled"] == 2 and scaled["steps"] == found["steps"], "the update is never scaled"
