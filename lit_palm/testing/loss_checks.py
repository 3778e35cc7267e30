"""Checks of `loss` and `weight` on tiny batches, without a Trainer: sums, masks, extremes and the first ratio."""

from __future__ import annotations

import copy
import re
from fnmatch import fnmatch

import pytest
import torch
from torch import Tensor

from lit_palm.objectives.base import Objective
from lit_palm.testing.batches import tiny_output
from lit_palm.testing.compare import (
    Elsewhere,
    Evaluation,
    alike,
    as_terms,
    call_loss,
    evaluate,
    garbled,
    nested_alike,
    partitions,
    transformed,
    widened,
    with_filler,
    with_filler_output,
)
from lit_palm.testing.subject import Factory, Subject
from lit_palm.types import Experience, Output

__all__ = ["LossChecks"]

# log-probabilities of every token in nats: (policy, the one that sampled, the rollout engine, reference)
EXTREMES: dict[str, tuple[float, float, float, float]] = {
    "every token has log-probability -1e4": (-1e4, -1e4, -1e4, -1e4),
    "every token is certain, log-probability 0": (0.0, 0.0, 0.0, 0.0),
    "the policy is 1e3 nats a token above all others": (-1.0, -1001.0, -1001.0, -1001.0),
    "the policy is 1e3 nats a token below all others": (-1001.0, -1.0, -1.0, -1.0),
    "the reference is 1e3 nats a token below": (-1.0, -1.0, -1.0, -1001.0),
    "the reference is 1e3 nats a token above": (-1001.0, -1001.0, -1001.0, -1.0),
    "the rollout engine is 1e3 nats a token below": (-1.0, -1.0, -1001.0, -1.0),
    "the rollout engine is 1e3 nats a token above": (-1001.0, -1001.0, -1.0, -1001.0),
}


class LossChecks(Subject):
    """What must hold of a loss so that masks, micro-batches and numbers at the edge do no harm."""

    def test_loss_and_weight_are_sums(self, objective: Factory) -> None:
        """A batch cut into micro-batches (whole groups, where rows travel in groups) gives the same sums.

        When it fails, accumulating gradients or adding a GPU changes what is learned: the loss or the weight is a
        mean, or uses statistics of the micro-batch. Return sums, and let the host divide.
        """
        made = self.make(objective)
        if made.coupled:
            pytest.skip(f"{type(made).__name__} declares that its rows are coupled across a batch")
        experience, output = self.batch(made)
        whole = evaluate(made, experience, output)
        for name, weight in whole.weights.items():
            assert weight > 0, f"weight() {name} is {weight:g} for a batch of {experience.num_rows} rows that all count"
        for parts in partitions(made, experience):
            self._same_sums(whole, evaluate(made, experience, output, parts), len(parts))

    def _same_sums(self, whole: Evaluation, parts: Evaluation, count: int) -> None:
        for name, total in whole.totals.items():
            assert alike(parts.totals[name], total), (
                f"the loss {name} of a batch is {total:.6g}, but the losses of its {count} micro-batches add up to "
                f"{parts.totals[name]:.6g}: return the sum over rows (or tokens), not a mean, and use no statistic of "
                "the rows that happen to be in a micro-batch (do that in `prepare`, or declare `coupled`)"
            )
        for name, weight in whole.weights.items():
            assert alike(parts.weights[name], weight), (
                f"the weight {name} of a batch is {weight:.6g}, but those of its {count} micro-batches add up to "
                f"{parts.weights[name]:.6g}: count the tokens, rows or pairs of the micro-batch, never a constant"
            )
        for key, gradient in whole.gradients.items():
            assert alike(parts.gradients[key], gradient), (
                f"the gradient of the loss {key[0]} by output.{key[1]} changes when a batch is cut into {count} "
                "micro-batches: a row's loss must depend on its group alone (or declare `coupled`)"
            )
        for name in whole.metrics.keys() | parts.metrics.keys():
            if not any(fnmatch(name, pattern) for pattern in self.statistics):
                assert name in whole.metrics and name in parts.metrics, (
                    f"metric {name!r} is reported for some micro-batches and not for others: report it always, with "
                    "count 0 where there is nothing to say"
                )
                assert alike(parts.metrics[name], whole.metrics[name]), (
                    f"metric {name!r} is {pair(whole, name)} for a batch and {pair(parts, name)} over its {count} "
                    "micro-batches: give (sum, count), not a mean; if it is a statistic of a micro-batch by design, "
                    "name it in `statistics` of the test class"
                )

    def test_loss_is_a_function_of_its_arguments(self, objective: Factory) -> None:
        """The same batch gives the same loss, whatever random numbers were drawn before, and however often it is asked.

        When it fails, runs cannot be repeated or resumed, or validation changes what is learned: draw nothing, and
        remember nothing in `loss` and `weight` (that is what `prepare` and `after_step` are for).
        """
        found = []
        with torch.random.fork_rng(devices=[]):
            for seed in (1, 2):
                torch.manual_seed(seed)
                made = self.make(objective)
                found.append(evaluate(made, *self.batch(made)))
        for field in ("totals", "weights", "gradients", "metrics"):
            assert nested_alike(getattr(found[0], field), getattr(found[1], field), 0), (
                f"two fresh objectives give other {field} for the same batch: the loss draws random numbers"
            )
        made = self.make(objective)
        experience, output = self.batch(made)
        state = copy.deepcopy(made.state_dict())
        first = evaluate(made, experience, output)
        assert nested_alike(state, made.state_dict(), 0) and nested_alike(
            first.totals, evaluate(made, experience, output).totals, 0
        ), (
            "loss() or weight() changed the objective: validation calls them too, and micro-batches are counted as "
            "steps. Update what is carried along in prepare() (rollouts), or in after_step() by metrics in `watches`"
        )

    def test_follows_its_batch_to_any_device(self, objective: Factory) -> None:
        """Every tensor that `loss` and `weight` make is made where the batch is.

        When it fails, training on a GPU stops with tensors on two devices: pass `device=experience["tokens"].device`.
        """
        made = self.make(objective)
        experience, output = self.batch(made)
        what = "a tensor is made without a device: pass device=experience['tokens'].device (or use new_zeros and so on)"
        device = experience["tokens"].device
        with Elsewhere():
            try:
                loss, weight = call_loss(made, output, experience), as_terms(made.weight(experience), "weight()")
            except (RuntimeError, NotImplementedError) as error:
                raise AssertionError(f"{what} ({str(error).splitlines()[0]})") from error
        found = {f"the weight {name}": value for name, value in weight.items()}
        found |= {f"the loss {name}": value for name, value in as_terms(loss.total, "Loss.total").items()}
        for name, (value, count) in loss.metrics.items():
            found |= {f"the sum of metric {name!r}": value, f"the count of metric {name!r}": count}
        for name, tensor in found.items():
            assert tensor.device == device, f"{name} is not where the batch is: {what}"

    # ------------------------------------------------------------------ what must not matter

    def test_padding_has_no_influence(self, objective: Factory) -> None:
        """More columns of padding, and garbage wherever `loss_mask` is False, change nothing.

        When it fails, the loss depends on the longest row of its batch, or reads log-probabilities of the prompt.
        """
        for garbage in (1e4, -1e4, float("nan")):
            self._unchanged(objective, 0, 3, garbage, f"padding or prompt positions that hold {garbage:g}")

    def test_prompt_has_no_influence(self, objective: Factory) -> None:
        """Longer prompts before the same completions change nothing.

        When it fails, something divides by or sums over `mask`, which includes the prompt, instead of `loss_mask`.
        """
        self._unchanged(objective, 2, 0, 0.0, "two more tokens of prompt")

    def _unchanged(self, objective: Factory, left: int, right: int, garbage: float, what: str) -> None:
        first, second = self.make(objective), self.make(objective)
        sampled = "rollouts" in first.needs
        experience = self.collection(first)
        wide = garbled(widened(self.collection(second), left, right), garbage)
        if sampled:
            experience, wide = first.prepare(experience), second.prepare(wide)
            wide = garbled(wide, garbage)
        advice = "use torch.where(loss_mask, x, 0), never x * mask, and take counts and lengths from loss_mask"
        assert wide.num_rows == experience.num_rows, f"with {what} prepare() keeps other rows: {advice}"
        output = tiny_output(first, experience)
        width, mask = wide["tokens"].shape[1], wide["loss_mask"]
        columns = slice(left, left + experience["tokens"].shape[1])

        def shift(values: Tensor) -> Tensor:
            padded = values.new_full((len(values), width), garbage)
            padded[:, columns] = values
            return torch.where(mask, padded, garbage)

        want = evaluate(first, experience, output)
        got = evaluate(second, wide, transformed(output, shift))
        for field in ("totals", "weights", "metrics"):
            one, other = getattr(want, field), getattr(got, field)
            assert one.keys() == other.keys()
            for name in one:
                assert alike(other[name], one[name]), (
                    f"{what} change {field} {name} from {one[name].tolist()} to {other[name].tolist()}: {advice}"
                )
        for (term, name), gradient in want.gradients.items():
            given = got.gradients[term, name]
            if given.dim() == 2:
                # networks compute nothing outside loss_mask, so what comes back there goes nowhere
                inside = experience["loss_mask"]
                given, gradient = torch.where(inside, given[:, columns], 0), torch.where(inside, gradient, 0)
            assert alike(given, gradient), f"{what} change the gradient by output.{name} {term}: {advice}"

    def test_filler_rows_count_for_nothing(self, objective: Factory) -> None:
        """A row without a True in `loss_mask` only fills a batch up; it adds nothing, also when it is alone.

        When it fails, the last batch of an epoch is wrong on several processes, or crashes them.
        """
        made = self.make(objective)
        experience, output = self.batch(made)
        filled, both = with_filler(experience), with_filler_output(output)
        want, got = evaluate(made, experience, output), evaluate(made, filled, both)
        advice = "use lit_palm.objectives.functional.rows_that_count(experience), or sums over loss_mask"
        for field in ("totals", "weights", "metrics"):
            one, other = getattr(want, field), getattr(got, field)
            for name in one:
                assert alike(other[name], one[name]), (
                    f"a filler row changes {field} {name} from {one[name].tolist()} to {other[name].tolist()}: {advice}"
                )
        for (term, name), gradient in got.gradients.items():
            own = gradient[-1].nan_to_num(1) if gradient.dim() == 1 else torch.zeros(())  # a row without loss_mask
            assert alike(gradient[:-1], want.gradients[term, name]) and not own.any(), (
                f"a filler row changes the gradient by output.{name} {term}: {advice}"
            )
        alone = evaluate(made, filled, both, [torch.tensor([experience.num_rows])])
        for name, total in alone.totals.items():
            assert total == 0 and alone.weights[name] == 0, (
                f"a micro-batch of nothing but a filler row has the loss {name} {total:g} and the weight "
                f"{alone.weights[name]:g}; both must be 0: divide by a length or a count only after .clamp(min=1), and "
                + advice
            )

    # ------------------------------------------------------------------ numbers at the edge

    def test_extremes_stay_finite(self, objective: Factory) -> None:
        """Log-probabilities down to -1e4 and ratios of e^1000 a token give a finite loss and finite gradients.

        When it fails, one improbable token ends a training run with NaN. Stay with logarithms (logsigmoid, log1p,
        logaddexp), and clamp an exponent before exp.
        """
        for what, logps in EXTREMES.items():
            made = self.make(objective)
            experience, output = self._extreme(made, logps)
            found = evaluate(made, experience, output)
            for name, total in found.totals.items():
                assert torch.isfinite(total), f"the loss {name} is {total:g} in float32 when {what}: clamp before exp"
            for (term, name), gradient in found.gradients.items():
                inside = gradient[experience["loss_mask"]] if gradient.dim() == 2 else gradient
                assert torch.isfinite(inside).all(), (
                    f"the gradient by output.{name} {term} is not finite in float32 when {what}: torch.where does not "
                    "stop a NaN on its way back, so clamp the argument before exp, log or a division"
                )

    def _extreme(self, made: Objective, logps: tuple[float, float, float, float]) -> tuple[Experience, Output]:
        policy, old, engine, reference = logps
        experience = self.collection(made, dtype=torch.float32)
        sign = 1 - 2.0 * (torch.arange(experience.num_rows) % 2)
        names = {"old_logps": old, "rollout_logps": engine, "ref_logps": reference, "values": -100.0}
        for name, value in names.items():
            if name in experience:
                experience[name] = torch.where(experience["loss_mask"], value, 0.0)
        if "rollouts" in made.needs:
            experience = made.prepare(experience)
            sign = sign[: experience.num_rows]
        output = tiny_output(made, experience)
        mask = experience["loss_mask"]
        for name, value in {"logps": policy, "ref_logps": reference, "values": 100.0, "log_z": 100.0}.items():
            leaf = getattr(output, name)
            if leaf is not None:
                new = torch.where(mask, value, 0.0).to(torch.float32)
                setattr(output, name, new.requires_grad_(leaf.requires_grad))
        if output.scores is not None:
            output.scores = (-policy - 1 + 1e-3) * sign.to(torch.float32)
            output.scores.requires_grad_()
        return experience, output

    def test_improbable_completions_teach(self, objective: Factory) -> None:
        """There is a gradient when every token has a log-probability near -1e3, where its probability is 0 in float32.

        When it fails, a probability is used where a log-probability was meant, and long completions teach nothing.
        """
        made = self.make(objective)
        experience = self.collection(made, dtype=torch.float32)
        for name in ("old_logps", "rollout_logps", "ref_logps"):
            if name in experience:
                experience[name] = torch.where(experience["loss_mask"], experience[name] - 1e3, 0)
        if "rollouts" in made.needs:
            experience = made.prepare(experience)
        output = tiny_output(made, experience)
        for name in ("logps", "ref_logps"):
            values = getattr(output, name)
            if values is not None and not (name == "logps" and "old_logps" in experience):
                lower = torch.where(experience["loss_mask"], values.detach() - 1e3, 0)
                setattr(output, name, lower.requires_grad_(values.requires_grad))
        found = evaluate(made, experience, output)
        teachers = [g for (_, name), g in found.gradients.items() if name in ("logps", "scores")]
        assert any(g.abs().max() > 0 for g in teachers), (
            "the policy gets no gradient at all from tokens of log-probability -1e3: exp() of it is 0 in float32. "
            "Compute with log-probabilities"
        )

    def test_old_logps_are_dispensable_as_promised(self, objective: Factory) -> None:
        """Without `old_logps` the loss and its gradients are those with the output's own, where the objective says so.

        When it fails, `old_logps_dispensable` promises too much: runs with one step a collection learn something else.
        """
        made = self.make(objective)
        if not made.old_logps_dispensable:
            pytest.skip(f"{type(made).__name__} does not say that it can do without old_logps")
        given, without = self.collection(made), self.collection(made)
        del without["old_logps"]
        given, without = made.prepare(given), self.make(objective).prepare(without)
        output = tiny_output(made, given)
        output.logps = given["old_logps"].clone().requires_grad_()
        found = [evaluate(made, experience, output) for experience in (given, without)]
        way_out = "take output.logps.detach() for them, or do not say that they are dispensable"
        for name, total in found[0].totals.items():
            assert torch.allclose(found[1].totals[name], total), f"without old_logps the loss {name} differs: {way_out}"
        for key, slope in found[0].gradients.items():
            assert torch.allclose(found[1].gradients[key], slope), (
                f"without old_logps {key}'s gradient differs: {way_out}"
            )

    def test_first_ratio_is_one(self, objective: Factory) -> None:
        """While the policy still is the one that sampled, its ratio is exactly 1 and nothing is clipped.

        When it fails, the loss compares with the wrong log-probabilities, and the first update already is off.
        """
        made = self.make(objective)
        if "old_logps" not in made.needs or self.ratio is None:
            pytest.skip(f"{type(made).__name__} forms no ratio of new to old probabilities")
        experience, output = self.batch(made)
        output.logps = experience["old_logps"].clone().requires_grad_()
        if output.values is not None:
            output.values = experience["values"].clone().requires_grad_()
        metrics = evaluate(made, experience, output).metrics
        assert self.ratio in metrics, (
            f"an objective that needs old_logps reports the mean ratio as {self.ratio!r}, the first thing that people "
            f"look for; it reports {', '.join(metrics) or 'nothing'}. (`ratio = None` in the test class: it forms none)"
        )
        value, count = metrics[self.ratio].tolist()
        assert abs(value - count) <= 1e-9 * count, (
            f"with output.logps == old_logps the metric {self.ratio!r} is {value / count:.6g} and must be 1: the ratio "
            "is exp(output.logps - experience['old_logps']) within loss_mask"
        )
        for name, (value, count) in ((n, p.tolist()) for n, p in metrics.items()):
            assert not re.search(r"clip_?(frac|ratio)", name) or value == 0, (
                f"before anything was learned {name!r} is {value / max(count, 1):.3g}: nothing can be clipped yet"
            )


def pair(found: Evaluation, name: str) -> str:
    """A metric as sum and count."""
    value, count = found.metrics[name].tolist()
    return f"({value:.6g}, {count:g})"
