"""The kit's tiny batches have the fields of real ones, and of outputs what the host fills for the same needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from lit_palm import Experience, Loss, Objective, Output
from lit_palm.objectives.base import Kind, Need
from lit_palm.testing import DataKind, natural_data, tiny_batch, tiny_experience, tiny_network, tiny_output
from lit_palm.testing.jobs import Job
from lit_palm.testing.subject import Subject


class Spy(Objective):
    """Notes down what it is given."""

    API_VERSION = 1

    def __init__(self, kind: Kind = "policy", needs: tuple[Need, ...] = (), grouped: bool = False) -> None:
        self.kind, self._needs, self.grouped = kind, frozenset(needs), grouped  # type: ignore[misc]
        self.seen: dict[str, dict[str, str]] = {}

    @property
    def needs(self) -> frozenset[Need]:
        return self._needs

    def prepare(self, experience: Experience) -> Experience:
        self.seen["collection"] = outline(experience)
        return experience

    def weight(self, experience: Experience) -> Tensor:
        return experience["loss_mask"].any(1).sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        self.seen["batch"], self.seen["output"] = outline(experience), outline(vars(output))
        learned = output.scores if self.kind == "reward" else output.logps
        return Loss(learned.sum())


def outline(fields: dict[str, Any]) -> dict[str, str]:
    """Dimensions and kind of numbers of every field, and whether it carries a gradient."""
    return {
        name: f"{value.dim()}d {'float' if value.is_floating_point() else value.dtype} {value.requires_grad}"
        if isinstance(value, Tensor)
        else type(value).__name__
        for name, value in fields.items()
        if value is not None
    }


ALL: tuple[Need, ...] = get_args(Need)


@pytest.mark.parametrize(
    "data, kind, needs",
    [
        ("pairs", "reward", ()),
        ("pairs", "policy", ("reference", "entropy", "log_z")),
        ("rankings", "reward", ()),
        ("ratings", "reward", ()),
        ("unpaired", "policy", ("reference",)),
        ("demonstrations", "policy", ("entropy",)),
        ("demonstrations", "language_model", ("log_z",)),
        ("prompts", "policy", ("rollouts",)),
        ("prompts", "policy", ("rollouts", "reward", "old_logps", "reference")),
        ("prompts", "policy", ALL),
    ],
)
def test_they_have_the_fields_of_real_ones(data: DataKind, kind: Kind, needs: tuple[Need, ...], tmp_path: Path) -> None:
    spy = Spy(kind, needs)
    subject = type("Tests", (Subject,), {"data": data})()
    Job(subject, lambda: spy, tmp_path).fit(epochs=1)
    experience = tiny_experience(data, needs)
    if data == "prompts":
        assert outline(experience) == spy.seen["collection"]
        del experience["rewards"]  # minibatches have none
    assert outline(experience) == spy.seen["batch"]
    assert outline(vars(tiny_output(spy, experience))) == spy.seen["output"]


def test_what_an_objective_learns_from_is_guessed() -> None:
    assert natural_data(Spy(needs=("rollouts",), grouped=True)) == "prompts"
    assert natural_data(Spy("reward", grouped=True)) == natural_data(Spy(grouped=True)) == "pairs"
    assert natural_data(Spy("reward")) == "ratings"
    assert natural_data(Spy("language_model")) == natural_data(Spy()) == "demonstrations"


@pytest.mark.parametrize("data", get_args(DataKind))
def test_rows_are_ragged_padded_and_aligned(data: DataKind) -> None:
    experience = tiny_experience(data, ALL, completions_per_prompt=(4, 2))
    tokens, mask, loss_mask = (experience[name] for name in ("tokens", "mask", "loss_mask"))
    assert (mask.cumprod(1) == mask).all() and (loss_mask <= mask).all(), "right-padded"
    assert not loss_mask[:, 0].any() and loss_mask.any(1).all(), "each row has a prompt and a completion"
    assert len(mask.sum(1).unique()) > 2 and len(loss_mask.sum(1).unique()) > 2
    assert (tokens[mask] > 0).all() and (tokens[~mask] == 0).all()
    for name in ("old_logps", "rollout_logps", "ref_logps", "values"):
        if name in experience:
            assert not experience[name][~loss_mask].any()
            assert name == "values" or (experience[name] <= 0).all()
    if "group" in experience:
        for group in experience["group"].unique():
            own = experience["group"] == group
            prompts = tokens[own].masked_fill(loss_mask[own] | ~mask[own], 0)
            assert (prompts == prompts[0]).all(), "rows of a group answer the same prompt"


def test_they_are_a_function_of_the_seed() -> None:
    spy = Spy(needs=ALL)
    (one, out), (same, _), (other, _) = (tiny_batch(spy, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one["old_logps"], same["old_logps"])
    assert one["scores"].shape != other["scores"].shape or not torch.equal(one["scores"], other["scores"])
    assert not torch.equal(out.logps, one["old_logps"]), "the policy has moved"
    assert one["scores"].dtype == torch.float64 and one["scores"].unique().numel() == one.num_rows


def test_the_network_is_tiny() -> None:
    network = tiny_network(num_layers=2)
    assert network(torch.tensor([[1, 2, 262]])).shape == (1, 3, 263)
    assert sum(p.numel() for p in tiny_network().parameters()) < 12_000
