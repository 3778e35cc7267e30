"""Sound objectives, and the same with one defect each: those that peers shipped, and those that a plugin invites.

Each defect names the checks of the kit that must find it, in `caught_by`; all others must pass.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_palm import Experience, Loss, Objective, Output
from lit_palm.objectives.base import Need
from lit_palm.objectives.functional import RunningMoments, logistic_loss, pairs_of_rankings, rows_that_count

DEFECTS: list[type[Objective]] = []


def caught_by(*checks: str) -> Any:
    """Register a defect with the checks that find it, named without `test_`."""

    def register(cls: Any) -> Any:
        cls.checks = {f"test_{check}" for check in checks}
        DEFECTS.append(cls)
        return cls

    return register


def total(values: Tensor, mask: Tensor) -> Tensor:
    """The sum where the mask is True."""
    return torch.where(mask, values, 0).sum()


def as_count(rows: Tensor) -> Tensor:
    """The number of rows, where they are."""
    return torch.tensor(len(rows), device=rows.device)


# ------------------------------------------------------------------------------------------ sound ones


class Surrogate(Objective):
    """A clipped policy gradient against the mean of each prompt's completions, with a price on the divergence.

    Args:
        clip: the ratio is clipped to 1 +- clip.
        kl_coef: price of one nat away from the reference; it grows by a tenth with every collection.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(self, clip: float = 0.2, kl_coef: float = 0.1) -> None:
        self.clip, self.kl_coef = clip, kl_coef
        self.moments = RunningMoments()
        self.num_collections = 0

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"rollouts", "reward", "old_logps", "reference"})

    def advantages(self, experience: Experience) -> Tensor:
        scores = experience["scores"] / self.moments.std
        _, group, size = experience["group"].unique(return_inverse=True, return_counts=True)
        mean = torch.zeros(len(size), dtype=scores.dtype).index_add_(0, group, scores) / size
        return scores - mean[group]

    def prepare(self, experience: Experience) -> Experience:
        self.moments.update(experience["scores"])
        self.num_collections += 1
        experience["advantages"] = self.advantages(experience)
        experience["metrics"] = {"reward": experience["scores"].mean().item()}
        return experience

    def weight(self, experience: Experience) -> Tensor | dict[str, Tensor]:
        return experience["loss_mask"].sum()

    def log_ratio(self, output: Output, experience: Experience) -> Tensor:
        return torch.where(experience["loss_mask"], output.logps - experience["old_logps"], 0).clamp(-20, 20)

    def ratio(self, output: Output, experience: Experience) -> Tensor:
        return self.log_ratio(output, experience).exp()

    def per_token(self, ratio: Tensor, experience: Experience) -> Tensor:
        advantages = experience["advantages"]
        if advantages.dim() == 1:
            advantages = advantages[:, None]
        return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - self.clip, 1 + self.clip))

    def kl(self, output: Output, experience: Experience) -> Tensor:
        apart = torch.where(experience["loss_mask"], output.logps - experience["ref_logps"], 0)
        return (apart.square() / 2).sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        mask = experience["loss_mask"]
        ratio = self.ratio(output, experience)
        loss = total(self.per_token(ratio, experience), mask)
        loss = loss + self.kl_coef * 1.1**self.num_collections * self.kl(output, experience)
        return Loss(loss, self.metrics(ratio.detach(), mask))

    def metrics(self, ratio: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        clipped = ((ratio - 1).abs() > self.clip).float()
        return {"val/ratio": (total(ratio, mask), mask.sum()), "clip_ratio/mean": (total(clipped, mask), mask.sum())}

    def state_dict(self) -> dict[str, Any]:
        return {"num_collections": self.num_collections, "moments": self.moments.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_collections = state["num_collections"]
        self.moments.load_state_dict(state["moments"])


class Preference(Objective):
    """Logistic loss on the difference of log-ratios of a pair.

    Args:
        beta: how strongly the policy is held to the reference.
    """

    API_VERSION: ClassVar[int] = 1
    grouped: ClassVar[bool] = True

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = beta

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference"})

    def weight(self, experience: Experience) -> Tensor | dict[str, Tensor]:
        return as_count(pairs_of_rankings(experience)[0])

    def rewards(self, output: Output, experience: Experience) -> Tensor:
        mask = experience["loss_mask"]
        return self.beta * torch.where(mask, output.logps - output.ref_logps, 0).sum(1)

    def loss(self, output: Output, experience: Experience) -> Loss:
        rewards = self.rewards(output, experience)
        better, worse, _ = pairs_of_rankings(experience)
        margins = rewards[better] - rewards[worse]
        return Loss(logistic_loss(margins).sum(), {"rewards/margins": (margins.detach().sum(), as_count(better))})


class TwoTerms(Preference):
    """Pairs, and the likelihood of the better answer a token: two terms with weights of their own.

    Args:
        beta: how strongly the policy is held to the reference.
    """

    def weight(self, experience: Experience) -> dict[str, Tensor]:
        best = pairs_of_rankings(experience)[0]
        return {"pairs": as_count(best), "tokens": experience["loss_mask"][best].sum()}

    def loss(self, output: Output, experience: Experience) -> Loss:
        best = pairs_of_rankings(experience)[0]
        nll = -torch.where(experience["loss_mask"], output.logps, 0)[best].sum()
        loss = super().loss(output, experience)
        return Loss({"pairs": loss.total, "tokens": nll}, loss.metrics)


class BatchMean(Preference):
    """Margins around the mean of the micro-batch; it says that it is coupled.

    Args:
        beta: how strongly the policy is held to the reference.
    """

    @property
    def coupled(self) -> bool:
        return True

    def rewards(self, output: Output, experience: Experience) -> Tensor:
        rewards = super().rewards(output, experience)
        counted = rows_that_count(experience)
        rank = experience["rank"].to(rewards.dtype)
        return rewards + rank * torch.where(counted, rewards, 0).sum() / counted.sum().clamp(min=1)


SOUND = [Surrogate, Preference, TwoTerms, BatchMean]

# ------------------------------------------------------------------------------------------ sums and masks


@caught_by("loss_and_weight_are_sums", "padding_has_no_influence", "prompt_has_no_influence")
class AveragedOverPadding(Surrogate):
    """The mean over all columns of a row."""

    def per_token(self, ratio: Tensor, experience: Experience) -> Tensor:
        per_token = torch.where(experience["loss_mask"], super().per_token(ratio, experience), 0)
        return per_token.mean(1, keepdim=True).expand_as(per_token)


@caught_by("loss_and_weight_are_sums")
class MeanInsteadOfSum(Preference):
    """The mean over pairs."""

    def loss(self, output: Output, experience: Experience) -> Loss:
        loss = super().loss(output, experience)
        return Loss(loss.total / torch.as_tensor(self.weight(experience)).clamp(min=1), loss.metrics)


@caught_by("loss_and_weight_are_sums", "filler_rows_count_for_nothing")
class MinibatchesNotCounted(Surrogate):
    """The number of micro-batches is ignored: each has the weight 1."""

    def weight(self, experience: Experience) -> Tensor:
        return experience["loss_mask"].any().new_ones(())


@caught_by("loss_and_weight_are_sums")
class NormalisedByMicroBatch(BatchMean):
    """A statistic of the rows that happen to be together, undeclared."""

    coupled = False  # type: ignore[assignment]


@caught_by("loss_and_weight_are_sums")
class NotGrouped(Preference):
    """Pairs that may be torn apart."""

    grouped: ClassVar[bool] = False
    data = "pairs"


@caught_by("loss_and_weight_are_sums")
class MetricIsAMean(Preference):
    """A metric of count 1, whatever the number of pairs."""

    def loss(self, output: Output, experience: Experience) -> Loss:
        loss = super().loss(output, experience)
        value, count = loss.metrics["rewards/margins"]
        return Loss(loss.total, {"rewards/margins": (value / count.clamp(min=1), count.clamp(max=1))})


@caught_by("padding_has_no_influence", "prompt_has_no_influence")
class WhitenedUnmasked(Surrogate):
    """Mean and deviation over padding and prompts too."""

    def advantages(self, experience: Experience) -> Tensor:
        advantages = torch.where(experience["loss_mask"], super().advantages(experience)[:, None], 0)
        return (advantages - advantages.mean()) / (advantages.std() + 1e-8)


@caught_by("old_logps_are_dispensable_as_promised")
class PromisesTooMuch(Surrogate):
    """Without the old log-probabilities it takes the output's own, gradient and all: its ratio teaches nothing."""

    old_logps_dispensable = True  # type: ignore[assignment]

    def log_ratio(self, output: Output, experience: Experience) -> Tensor:
        old = experience.get("old_logps", output.logps)
        return torch.where(experience["loss_mask"], output.logps - old, 0).clamp(-20, 20)


@caught_by("padding_has_no_influence", "filler_rows_count_for_nothing")
class DivergenceOverPrompt(Surrogate):
    """The mask of the divergence covers the prompt."""

    def kl(self, output: Output, experience: Experience) -> Tensor:
        apart = torch.where(experience["mask"], output.logps - experience["ref_logps"], 0)
        return (apart.square() / 2).sum()


@caught_by("padding_has_no_influence")
class MultipliedByMask(Preference):
    """What is not finite outside the mask gets through."""

    def rewards(self, output: Output, experience: Experience) -> Tensor:
        return self.beta * ((output.logps - output.ref_logps) * experience["loss_mask"]).sum(1)


@caught_by("prompt_has_no_influence")
class LengthWithPrompt(Preference):
    """Length normalisation by prompt and completion together."""

    def rewards(self, output: Output, experience: Experience) -> Tensor:
        return super().rewards(output, experience) / experience["mask"].sum(1)


@caught_by("filler_rows_count_for_nothing")
class CountsFillers(Objective):
    """The weight counts rows that only fill a batch up."""

    API_VERSION: ClassVar[int] = 1
    kind = "reward"

    def weight(self, experience: Experience) -> Tensor:
        return as_count(experience["tokens"])

    def loss(self, output: Output, experience: Experience) -> Loss:
        error = F.mse_loss(output.scores, experience["rating"], reduction="none")
        return Loss(torch.where(rows_that_count(experience), error, 0).sum())


@caught_by("filler_rows_count_for_nothing")
class NoGraphWithoutPairs(Preference):
    """A constant where there is no pair, which backward refuses."""

    def loss(self, output: Output, experience: Experience) -> Loss:
        if len(pairs_of_rankings(experience)[0]) == 0:
            zero = torch.zeros(())
            return Loss(zero, {"rewards/margins": (zero, zero)})
        return super().loss(output, experience)


@caught_by("filler_rows_count_for_nothing")
class MeanOfNoTokens(Surrogate):
    """0 / 0 for a row without completion."""

    def per_token(self, ratio: Tensor, experience: Experience) -> Tensor:
        return super().per_token(ratio, experience)

    def kl(self, output: Output, experience: Experience) -> Tensor:
        mask = experience["loss_mask"]
        apart = torch.where(mask, output.logps - experience["ref_logps"], 0).square().sum(1)
        return (apart / mask.sum(1)).sum()


@caught_by("follows_its_batch_to_any_device")
class MadeOnTheHost(Preference):
    """Counts where nobody asked for a device."""

    def weight(self, experience: Experience) -> Tensor:
        return torch.tensor(len(pairs_of_rankings(experience)[0]))


@caught_by("follows_its_batch_to_any_device")
class IndexedOnTheHost(Preference):
    """Weighs tokens by their place, with an index that is on another device."""

    def rewards(self, output: Output, experience: Experience) -> Tensor:
        mask = experience["loss_mask"]
        place = (mask.cumsum(1) - 1).clamp(min=0)
        weights = torch.linspace(1, 0.5, 64)[place]
        return self.beta * torch.where(mask, weights * (output.logps - output.ref_logps), 0).sum(1)


@caught_by(
    "loss_is_a_function_of_its_arguments",
    "loss_and_weight_are_sums",
    "filler_rows_count_for_nothing",
    "state_goes_on",
)
class CountsCalls(Preference):
    """Anneals with every call of the loss, of which validation makes some too."""

    calls = 0

    def rewards(self, output: Output, experience: Experience) -> Tensor:
        self.calls += 1
        return super().rewards(output, experience) * 0.9**self.calls


# ------------------------------------------------------------------------------------------ numbers at the edge


@caught_by("improbable_completions_teach")
class Probability(Preference):
    """Probabilities where log-probabilities were meant."""

    def rewards(self, output: Output, experience: Experience) -> Tensor:
        mask = experience["loss_mask"]
        return torch.where(mask, output.logps.exp() - output.ref_logps.exp(), 0).sum(1)


@caught_by("extremes_stay_finite")
class Overflow(Surrogate):
    """exp without a clamp."""

    def ratio(self, output: Output, experience: Experience) -> Tensor:
        return torch.where(experience["loss_mask"], output.logps - experience["old_logps"], 0).exp()


@caught_by("extremes_stay_finite")
class NotANumberOnTheWayBack(Surrogate):
    """torch.where hides an infinity, and 0 times infinity comes back."""

    def ratio(self, output: Output, experience: Experience) -> Tensor:
        log_ratio = torch.where(experience["loss_mask"], output.logps - experience["old_logps"], 0)
        return torch.where(log_ratio > 20, 20.0, log_ratio.exp())


@caught_by("extremes_stay_finite")
class NaiveSigmoid(Preference):
    """log(sigmoid(x)) instead of logsigmoid(x)."""

    def loss(self, output: Output, experience: Experience) -> Loss:
        rewards = self.rewards(output, experience)
        better, worse, _ = pairs_of_rankings(experience)
        return Loss(-torch.log(torch.sigmoid(rewards[better] - rewards[worse])).sum())


@caught_by("extremes_stay_finite")
class OddsOfCertainty(Preference):
    """log(1 - p), where p may be 1."""

    def rewards(self, output: Output, experience: Experience) -> Tensor:
        mask = experience["loss_mask"]
        mean = torch.where(mask, output.logps, 0).sum(1) / mask.sum(1).clamp(min=1)
        return mean - torch.log(1 - mean.exp())


# ------------------------------------------------------------------------------------------ the ratio


@caught_by("first_ratio_is_one")
class RatioToReference(Surrogate):
    """Compares with the reference instead of with what sampled."""

    def log_ratio(self, output: Output, experience: Experience) -> Tensor:
        return torch.where(experience["loss_mask"], output.logps - experience["ref_logps"], 0).clamp(-20, 20)


@caught_by("first_ratio_is_one")
class RatioForgetsTemperature(Surrogate):
    """Divides one side by a temperature and not the other."""

    def log_ratio(self, output: Output, experience: Experience) -> Tensor:
        return torch.where(experience["loss_mask"], output.logps / 0.9 - experience["old_logps"], 0).clamp(-20, 20)


@caught_by("first_ratio_is_one")
class ClipFlag(Surrogate):
    """Counts what equals its clipped value as clipped."""

    def metrics(self, ratio: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        clipped = (ratio == ratio.clamp(1 - self.clip, 1 + self.clip)).float()
        return super().metrics(ratio, mask) | {"policy/clipfrac_avg": (total(clipped, mask), mask.sum())}


@caught_by("first_ratio_is_one")
class NoRatio(Surrogate):
    """Does not report the first thing that people look for."""

    def metrics(self, ratio: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {}


# ------------------------------------------------------------------------------------------ collections


@caught_by(
    "prepare_depends_on_nothing_else",
    "loss_is_a_function_of_its_arguments",
    "prepare_ignores_the_order_of_rows",
    "state_goes_on",
    "padding_has_no_influence",
    "prompt_has_no_influence",
)
class RandomPreparation(Surrogate):
    """Breaks ties by chance, so that processes disagree."""

    def advantages(self, experience: Experience) -> Tensor:
        return super().advantages(experience) + 1e-3 * torch.rand(experience.num_rows)


@caught_by("prepare_ignores_the_order_of_rows", "prepare_takes_prompts_of_any_size")
class OrderDependent(Surrogate):
    """Takes each four rows for the completions of one prompt."""

    def advantages(self, experience: Experience) -> Tensor:
        scores = experience["scores"].view(-1, 4)
        return (scores - scores.mean(1, keepdim=True)).flatten()


@caught_by("prepare_keeps_what_it_promises")
class KeepsMore(Surrogate):
    """Promises the best of each prompt, and keeps all."""

    def num_kept(self, num_prompts: int, completions: int) -> int:
        return num_prompts


@caught_by("prepare_keeps_what_it_promises")
class NotARow(Surrogate):
    """A number of the whole collection as if it were a field."""

    def prepare(self, experience: Experience) -> Experience:
        experience = super().prepare(experience)
        experience["baseline"] = 0.5
        return experience


@caught_by("prepare_keeps_what_it_promises")
class UnequalGroups(Surrogate):
    """Rows travel in groups, of which one loses a row."""

    grouped: ClassVar[bool] = True
    data = "prompts"

    def prepare(self, experience: Experience) -> Experience:
        rows = torch.arange(experience.num_rows)
        kept = experience.select(rows[experience["row"] != 0])
        return super().prepare(kept)


@caught_by("equal_rewards_stay_finite", "prepare_takes_prompts_of_any_size")
class DividesByDeviation(Surrogate):
    """The deviation of a prompt's scores may be 0, and is none for a single one."""

    def advantages(self, experience: Experience) -> Tensor:
        scores, group = experience["scores"], experience["group"]
        mean = torch.stack([scores[group == g].mean() for g in group])
        return (scores - mean) / torch.stack([scores[group == g].std(correction=0) for g in group])


@caught_by("accept_takes_whole_groups")
class AcceptsRows(Surrogate):
    """Rejects completions, not prompts."""

    def accept(self, experience: Experience) -> Tensor:
        return experience["scores"] > 0


# ------------------------------------------------------------------------------------------ state


@caught_by("state_goes_on")
class ForgottenMoments(Surrogate):
    """Running moments are lost on resume."""

    def state_dict(self) -> dict[str, Any]:
        return {"num_collections": self.num_collections}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_collections = state["num_collections"]


@caught_by("state_goes_on")
class ForgottenState(Surrogate):
    """Counter, coefficient and moments are lost on resume."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


@caught_by("state_goes_on")
class NotRestored(Surrogate):
    """Saves what it does not load."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments.load_state_dict(state["moments"])


@caught_by("state_goes_on")
class UnsafeState(Surrogate):
    """An object, which a checkpoint cannot hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments}


@caught_by("state_goes_on")
class WatchesNothing(Surrogate):
    """Waits for a metric that its loss does not report."""

    @property
    def watches(self) -> tuple[str, ...]:
        return ("policy/approxkl_avg",)


# ------------------------------------------------------------------------------------------ the package


@caught_by("arguments_are_typed_and_documented")
class Undocumented(Preference):
    """Says nothing of its argument.

    Args:
        beta: how strongly the policy is held to the reference.
    """

    def __init__(self, beta: float = 0.1, gamma: float = 1.0) -> None:
        super().__init__(beta)
        self.gamma = gamma


@caught_by("arguments_are_typed_and_documented")
class Untyped(Preference):
    """Takes anything.

    Args:
        beta: how strongly the policy is held to the reference.
    """

    def __init__(self, beta=0.1) -> None:  # type: ignore[no-untyped-def]
        super().__init__(beta)


@caught_by("arguments_are_typed_and_documented")
class Positional(Preference):
    """Takes arguments without names.

    Args:
        betas: one for each kind.
    """

    def __init__(self, *betas: float) -> None:
        super().__init__(0.1)


@caught_by("yaml_round_trip")
class WrongType(Preference):
    """Its default is not of the type it claims.

    Args:
        beta: how strongly the policy is held to the reference.
    """

    def __init__(self, beta: int = 1) -> None:
        super().__init__(beta)

    arguments: ClassVar[dict[str, Any]] = {"beta": 0.3}


@caught_by("declares_what_there_is")
class Misspelt(Preference):
    """Needs what nobody has."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference", "entropies"})  # type: ignore[arg-type]


def inside() -> type[Objective]:
    @caught_by("yaml_round_trip")
    class Hidden(Preference):
        """Nobody can import it.

        Args:
            beta: how strongly the policy is held to the reference.
        """

    return Hidden


hidden = inside()


class _NoVersion(Objective):
    """Written for some version or other."""

    def weight(self, experience: Experience) -> Tensor:
        return experience["loss_mask"].sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        return Loss(-total(output.logps, experience["loss_mask"]))


@caught_by("states_its_api_version")
class NoVersion(_NoVersion):
    """States no API_VERSION."""


@caught_by("states_its_api_version")
class AnyVersion(_NoVersion):
    """Agrees with every version."""

    API_VERSION: ClassVar[int] = Objective.API_VERSION


@caught_by("states_its_api_version")
class OldVersion(_NoVersion):
    """Written for another one."""

    API_VERSION: ClassVar[int] = 0
