"""Checks of what happens once a collection: `accept`, `prepare` and `num_kept`, and of the state carried along.

They are about objectives that sample; the check of the state is for all.
"""

from __future__ import annotations

import copy
import io
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from lit_palm.objectives.base import Objective
from lit_palm.testing.batches import tiny_output
from lit_palm.testing.compare import call_loss, evaluate, nested_alike
from lit_palm.testing.subject import Factory, Subject
from lit_palm.types import Experience

__all__ = ["CollectionChecks"]

NOT_ROWS = ("rewards", "metrics")
"""Fields of a whole collection that are dictionaries."""


class CollectionChecks(Subject):
    """What must hold of the preparation of a collection, and of what an objective remembers."""

    def test_prepare_depends_on_nothing_else(self, objective: Factory) -> None:
        """Two fresh objectives prepare the same collection alike, whatever random numbers were drawn before.

        When it fails, processes disagree on what they learn from: every one of them prepares the whole collection.
        """
        self.samples(self.make(objective))
        found = []
        with torch.random.fork_rng(devices=[]):
            for seed in (1, 2):
                torch.manual_seed(seed)
                made = self.make(objective)
                found.append(dict(made.prepare(self.collection(made))))
        assert nested_alike(found[0], found[1], 0), (
            "prepare() gives another result the second time: draw no random numbers; where chance is wanted, make a "
            "torch.Generator from a seed and `row`"
        )

    def test_prepare_ignores_the_order_of_rows(self, objective: Factory) -> None:
        """A collection whose rows come in another order is prepared alike.

        When it fails, `prepare` takes rows for neighbours that are not: tell completions of a prompt by `group`.
        """
        first, second = self.make(objective), self.make(objective)
        self.samples(first)
        experience = self.collection(first)
        order = torch.randperm(experience.num_rows, generator=torch.Generator().manual_seed(0))
        mixed = chosen(self.collection(second), order)
        one, other = by_row(first.prepare(experience)), by_row(second.prepare(mixed))
        assert one.get("row", torch.empty(0)).tolist() == other.get("row", torch.empty(0)).tolist(), (
            "prepare() keeps other rows when they come in another order: select by `group` and `scores`, not by place"
        )
        for name in one.keys() | other.keys():
            assert name in one and name in other and nested_alike(one[name], other[name]), (
                f"prepare() gives another {name!r} when rows come in another order: tell completions of a prompt by "
                "`group`, for example with group.unique(return_inverse=True) and index_add_, and never by reshaping"
            )

    def test_prepare_keeps_what_it_promises(self, objective: Factory) -> None:
        """At most `num_kept` rows remain, every field has one entry a row, and minibatches can be cut from them.

        When it fails, a run stops at its first collection, or its minibatches mix up rows.
        """
        self.samples(self.make(objective))
        for num_prompts in (4, 6):
            made = self.make(objective)
            experience = self.collection(made, num_prompts=num_prompts)
            num_rows = experience.num_rows
            sizes = num_prompts, num_rows // num_prompts
            promised = made.num_kept(*sizes)
            assert 1 <= promised <= num_rows, f"num_kept{sizes} is {promised}: it must lie in 1 to {num_rows}"
            prepared = made.prepare(experience)
            assert isinstance(prepared, Experience), "prepare() must return the experience"
            assert prepared.num_rows <= promised, (
                f"prepare() kept {prepared.num_rows} of {num_rows} rows and num_kept{sizes} promised {promised} at "
                "most: override num_kept together with a selection"
            )
            for name, value in prepared.items():
                if name not in NOT_ROWS:
                    self._per_row(name, value, prepared.num_rows)
            self._same_number(made, prepared, promised // num_prompts)
            self._selects(prepared)

    def _per_row(self, name: str, value: Any, num_rows: int) -> None:
        assert isinstance(value, Tensor | list) and (isinstance(value, list) or value.dim() > 0), (
            f"prepare() adds {name!r}, a {type(value).__name__} without rows: minibatches are cut by row, so give one "
            "value a row (a number for the whole collection goes into experience['metrics'] or onto self)"
        )
        assert len(value) == num_rows, (
            f"after prepare() {name!r} has {len(value)} entries for {num_rows} rows: keep rows with experience.select()"
        )

    def _same_number(self, made: Objective, prepared: Experience, unit: int) -> None:
        if made.grouped and prepared.num_rows:
            sizes = prepared["group"].unique(return_counts=True)[1]
            assert (sizes == unit).all(), (
                f"after prepare() groups have {sizes.tolist()} rows; an objective whose rows travel in groups must "
                f"keep equally many of each, here {unit}"
            )

    def _selects(self, prepared: Experience) -> None:
        picked = prepared.select(list(range(prepared.num_rows))[::-1])
        width = picked["tokens"].shape[1]
        for name, value in picked.items():
            want = prepared[name]
            if isinstance(want, Tensor):
                want = want.flip(0)
                if want.dim() >= 2 and want.shape[1] == prepared["tokens"].shape[1]:
                    want = want[:, :width]
                assert value.shape == want.shape, f"{name!r} cannot be cut into minibatches: make it [B] or [B, T]"

    def test_prepare_takes_prompts_of_any_size(self, objective: Factory) -> None:
        """Prompts with different numbers of completions, and a collection of a single one, are prepared too.

        When it fails, dynamic sampling and short collections stop a run: baselines must not assume a fixed number.
        """
        made = self.make(objective)
        self.samples(made)
        if not made.grouped:
            size = max(self.completions_per_prompt, 2)
            what = f"prompts with {size} and {size - 1} completions"
            self._prepares(objective, what, num_prompts=3, completions_per_prompt=(size, size - 1))
            with suppress(ValueError):
                made.num_kept(4, 1)  # refuses, if it cannot work with one
                self._prepares(objective, "one completion a prompt", completions_per_prompt=1)
        self._prepares(objective, "a single prompt", num_prompts=1)

    def _prepares(self, objective: Factory, what: str, **options: Any) -> None:
        made = self.make(objective)
        try:
            prepared = made.prepare(self.collection(made, **options))
        except Exception as error:
            raise AssertionError(
                f"prepare() fails on a collection of {what} ({type(error).__name__}: {error}): count the completions "
                "of each group instead of dividing by a fixed number (num_kept() may refuse a number that never works)"
            ) from error
        if prepared.num_rows:
            found = evaluate(made, prepared, tiny_output(made, prepared))
            for total in found.totals.values():
                assert torch.isfinite(total), f"the loss is {total:g} after a collection of {what}: clamp deviations"

    def test_equal_rewards_stay_finite(self, objective: Factory) -> None:
        """A collection whose completions all earn the same gives finite losses and gradients.

        When it fails, something is divided by a standard deviation of 0: add an epsilon, or clamp.
        """
        made = self.make(objective)
        self.samples(made)
        experience = self.collection(made)
        experience["scores"] = torch.ones_like(experience["scores"])
        experience["rewards"] = {k: torch.ones_like(v) for k, v in experience["rewards"].items()}
        prepared = made.prepare(experience)
        if prepared.num_rows:
            found = evaluate(made, prepared, tiny_output(made, prepared))
            assert all(torch.isfinite(t) for t in found.totals.values()), (
                "the loss is not finite when all completions of a prompt earn the same: divide by std + eps"
            )

    def test_accept_takes_whole_groups(self, objective: Factory) -> None:
        """`accept` says the same for all completions of a prompt, and depends on nothing but the rows.

        When it fails, collections hold parts of groups, and baselines are computed from too few completions.
        """
        made = self.make(objective)
        self.samples(made)
        experience = self.collection(made)
        same = experience["group"] == 0  # dynamic sampling rejects those
        for values in (experience["scores"], *experience["rewards"].values()):
            values[same] = 1.0
        before = copy.deepcopy(dict(experience))
        verdict = made.accept(experience)
        assert nested_alike(before, dict(experience), 0), "accept() changed the experience: it only says which rows"
        if verdict is None:
            return
        assert verdict.dtype == torch.bool and verdict.shape == experience["group"].shape, (
            f"accept() must return one bool a row, [{experience.num_rows}], or None; it gave {verdict.dtype} of shape "
            f"{list(verdict.shape)}"
        )
        for group in experience["group"].unique():
            own = verdict[experience["group"] == group]
            assert own.all() or not own.any(), "accept() takes some completions of a prompt and not others"
        order = torch.arange(experience.num_rows).flip(0)
        again = self.make(objective).accept(chosen(experience, order))
        assert again is not None and torch.equal(again, verdict[order]), "accept() depends on the order of rows"

    def test_state_goes_on(self, objective: Factory) -> None:
        """A fresh objective that loads the state goes on exactly as the one that saved it.

        When it fails, a counter, a coefficient or running moments are lost on resume: put them into `state_dict`.
        """
        old, new = self.make(objective), self.make(objective)
        for seed in (0, 1):
            self._step(old, seed)
        saved = io.BytesIO()
        torch.save(old.state_dict(), saved)
        saved.seek(0)
        try:
            state = torch.load(saved, weights_only=True)
        except Exception as error:
            raise AssertionError(
                "state_dict() holds something that a checkpoint cannot hold: keep to numbers, strings, tensors, and "
                f"lists and dictionaries of these ({error})"
            ) from error
        new.load_state_dict(copy.deepcopy(state))
        assert nested_alike(new.state_dict(), state, 0), (
            "after load_state_dict(state) the state_dict() is another one: restore everything that was saved"
        )
        for seed in (2, 3):
            assert nested_alike(self._step(old, seed), self._step(new, seed), 0), (
                "an objective that was saved and loaded goes on otherwise than the one that was not interrupted: "
                "state_dict() must hold everything that changes from step to step (counters, coefficients, moments)"
            )

    def _step(self, made: Objective, seed: int) -> Any:
        """What a step comes to: prepared fields, loss and metrics, and the verdict of `after_step`."""
        experience = self.collection(made, seed=seed)
        if "rollouts" in made.needs:
            experience = made.prepare(experience)
        output = tiny_output(made, experience, seed=seed)
        loss = call_loss(made, output, experience)
        watched = {}
        for name in made.watches:
            assert name in loss.metrics, f"`watches` names {name!r}, which is no metric of loss()"
            value, count = loss.metrics[name]
            watched[name] = float(value / count.clamp(min=1))
        stop = made.after_step(watched)
        assert isinstance(stop, bool), f"after_step() must return a bool, not {type(stop).__name__}"
        return [dict(experience), loss.total, dict(loss.metrics), sorted(loss.frozen), stop]


def chosen(experience: Experience, rows: Tensor) -> Experience:
    """Some rows of a collection, with their rewards."""
    picked = experience.select(rows)
    picked["rewards"] = {name: values[rows] for name, values in experience["rewards"].items()}
    return picked


def by_row(experience: Experience) -> dict[str, Any]:
    """A prepared collection in the order of `row`, with its metrics."""
    assert "row" in experience, "prepare() dropped the field `row`: keep rows with experience.select()"
    ordered: dict[str, Any] = dict(experience.select(experience["row"].argsort()))
    return ordered | {"metrics": experience.get("metrics", {})}
