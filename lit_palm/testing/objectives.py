"""`ObjectiveConformance`: everything that an objective must keep to, as a class of tests to inherit.

    class TestMyLoss(ObjectiveConformance):
        @pytest.fixture
        def objective(self):
            return MyLoss                  # a class, or functools.partial(MyLoss, beta=0.3)

The data are made from what the objective declares: `kind`, `grouped` and `needs`. What cannot be guessed is said in
class attributes, which `Subject` lists: `data = "unpaired"`, `completions_per_prompt = 8`. An objective with many
variants runs the pure part on each (`ObjectiveChecks`, with a fixture that has params) and the trainings on a few.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_palm.testing.collection_checks import CollectionChecks
from lit_palm.testing.compare import nested_alike
from lit_palm.testing.entries import class_path, is_plain, parameters, plain
from lit_palm.testing.jobs import Job, command
from lit_palm.testing.loss_checks import LossChecks
from lit_palm.testing.package_checks import PackageChecks
from lit_palm.testing.subject import Factory, Subject, class_and_arguments

__all__ = ["ObjectiveChecks", "ObjectiveConformance", "ObjectiveRuns"]

# float32 sums in another order, relative to how far training moved the weights. Measured over all objectives, also of
# plugins/: 4e-5 at most, where weights of size 1 moved by 0.003. Defects are at least some hundredths.
SAME_STEP = 1e-3


class ObjectiveChecks(LossChecks, CollectionChecks, PackageChecks):
    """The checks that need tensors alone: losses, masks, collections, state, arguments, the entry point. A second."""


class ObjectiveRuns(Subject):
    """The checks that train a network of ten thousand parameters: one process, two, and interrupted. Half a minute."""

    def test_accumulation_takes_the_step_of_a_large_batch(self, objective: Factory, tmp_path: Path) -> None:
        """Training with two accumulated micro-batches a step ends with the weights of training with large batches.

        When it fails, `accumulate_grad_batches` changes what is learned. `test_loss_and_weight_are_sums` says why; if
        that passes, the objective counts or remembers something by micro-batch.
        """
        if self.make(objective).coupled:
            pytest.skip("its rows are coupled across a batch: a large batch takes another step by design")
        job = Job(self, objective, tmp_path)
        large, small = job.fit(), job.fit(ways=2)
        assert large.trainer.global_step == small.trainer.global_step, (
            f"{large.trainer.global_step} steps of one batch, {small.trainer.global_step} of two accumulated ones"
        )
        apart = difference(large.start, large.weights, small.weights)
        assert apart < SAME_STEP, (
            f"with accumulate_grad_batches 2 the weights end {apart:.1%} of the way that they moved elsewhere: the "
            "loss is no sum over rows, or the objective changes with every micro-batch it sees"
        )

    def test_two_processes_take_the_step_of_one(self, objective: Factory, tmp_path: Path) -> None:
        """`lit-palm fit` on two processes ends with the weights of one process.

        When it fails, adding a GPU changes what is learned, or hangs. An objective must not know of processes: what
        needs the rows of all of them belongs into `prepare`.
        """
        cls, _ = class_and_arguments(objective)
        class_path(cls)
        job = Job(self, objective, tmp_path)
        command(["fit", "--config", str(job.write_config(2))], cls, ranks=2)
        one = job.fit()
        saved = torch.load(tmp_path / "cli" / "last.ckpt", weights_only=True)
        assert saved["global_step"] == one.trainer.global_step, (
            f"{saved['global_step']} steps on two processes, {one.trainer.global_step} on one"
        )
        state: dict[str, Tensor] = saved["state_dict"]
        assert all(torch.isfinite(v).all() for v in state.values()), "on two processes weights became infinite or NaN"
        if self.make(objective).coupled:
            return
        apart = difference(one.start, one.weights, state)
        assert apart < SAME_STEP, (
            f"on two processes the weights end {apart:.1%} of the way that they moved elsewhere: the loss is no sum "
            "over rows, or the objective remembers what only its own process saw"
        )

    def test_first_step_of_a_run_has_ratio_one(self, objective: Factory, tmp_path: Path) -> None:
        """The first ratio that a run logs is 1, to 1e-4 in float32.

        When it fails, the loss does not compare with what sampled, or `prepare` changed the log-probabilities.
        """
        if "old_logps" not in self.make(objective).needs or self.ratio is None:
            pytest.skip("it forms no ratio of new to old probabilities")
        first = Job(self, objective, tmp_path).fit(epochs=1).metrics[0]
        assert self.ratio in first, f"a run logs no {self.ratio!r}, only {', '.join(sorted(first))}"
        assert abs(first[self.ratio] - 1) <= 1e-4, (
            f"the first {self.ratio!r} of a run is {first[self.ratio]:.6g} and must be 1: compare output.logps with "
            "old_logps as the host gave them"
        )

    def test_resume_is_exact(self, objective: Factory, tmp_path: Path) -> None:
        """A run that is interrupted after any step, in the middle of a collection too, ends with the same bits.

        When it fails, what the objective carries from step to step is not in `state_dict`, or depends on chance.
        """
        job = Job(self, objective, tmp_path)
        options: dict[str, Any] = {"passes": 2} if job.samples else {}
        saving = ModelCheckpoint(tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=1)
        straight = job.fit(callbacks=[saving], **options)
        expected, steps = straight.everything(), straight.trainer.global_step
        for step in range(1, steps):
            resumed = job.fit(resume=tmp_path / "steps" / f"step={step}.ckpt", **options).everything()
            for part, value in expected.items():
                assert nested_alike(resumed[part], value, 0), (
                    f"a run of {steps} steps that is interrupted after step {step} and resumed ends with another "
                    f"{part}: save everything that changes from step to step in state_dict(), and draw no numbers"
                )

    def test_command_line_gives_it_back(self, objective: Factory, tmp_path: Path) -> None:
        """`lit-palm fit --model.objective=NAME --model.objective.ARGUMENT=VALUE --print_config` gives the same back.

        The name is the short one when the class is installed. When it fails, nobody can configure the objective.
        """
        cls, arguments = class_and_arguments(objective)
        path = class_path(cls)
        job = Job(self, objective, tmp_path)
        flags = [f"--model.objective={job.objective_name()}"]
        flags += [f"--model.objective.{name}={as_flag(value)}" for name, value in arguments.items()]
        printed = command(["fit", "--config", str(job.write_config(1)), *flags, "--print_config"], cls)
        given = yaml.safe_load(printed)["model"]["init_args"]["objective"]
        assert given["class_path"] == path or given["class_path"].rpartition(".")[2] == cls.__name__, (
            f"--model.objective={job.objective_name()} became {given['class_path']}, not {path}"
        )
        for name, (parameter, _) in parameters(cls).items():
            want = arguments.get(name, parameter.default)
            if is_plain(want):
                assert plain(given.get("init_args", {}).get(name)) == plain(want), (
                    f"--model.objective.{name}={want!r} became {given.get('init_args', {}).get(name)!r} in the printed "
                    "configuration: annotate the argument with the type of its values"
                )


class ObjectiveConformance(ObjectiveChecks, ObjectiveRuns):
    """All checks. One objective takes about half a minute on one thread; see the module's docstring for how to use it.

    Beside the fixture `objective`, an author may set the class attributes that `lit_palm.testing.subject.Subject`
    lists. What does not apply to an objective (collections of one that does not sample, micro-batches of one that is
    coupled) is skipped with the reason.
    """


def difference(start: dict[str, Tensor], one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of two sets of weights, relative to how far the first moved from the start.

    Raises:
        AssertionError: it did not move, so that nothing could be compared.
    """
    assert one.keys() == other.keys(), "two runs of one objective trained other networks"
    moved = max(float((one[k] - start[k]).abs().max()) for k in one)
    assert moved > 1e-5, "training did not change the weights: does the loss reach the output's fields?"
    return max(float((one[k] - other[k]).abs().max()) for k in one) / moved


def as_flag(value: Any) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(plain(value))
