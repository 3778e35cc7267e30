"""Tiny batches with everything an objective may ask for: what the checks run on, and what unit tests can start from.

    from lit_palm.testing import tiny_batch, tiny_experience, tiny_output

    experience, output = tiny_batch(MyLoss())          # prepared, and what the networks would have computed
    experience = tiny_experience("pairs", seed=3)

They have the fields, shapes and rules of real batches (see `lit_palm.types`): ragged prompts and completions,
right-padded, per-token fields aligned with their token and zero outside `loss_mask`. Log-probabilities are those of a
small vocabulary, ratios lie on both sides of usual clips, scores have no ties. Everything is a function of the seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lit_palm.models.base import Network
from lit_palm.models.palm import PaLMConfig
from lit_palm.objectives.base import Objective
from lit_palm.types import Experience, Output

__all__ = ["DataKind", "natural_data", "tiny_batch", "tiny_experience", "tiny_network", "tiny_output"]

DataKind = Literal["pairs", "rankings", "ratings", "demonstrations", "unpaired", "prompts"]
"""What an objective learns from; `prompts` are completions that the policy samples itself."""

LEAVES = ("logps", "entropy", "log_z", "values", "scores")
"""Fields of an output that come from trained networks, and so carry gradients."""

LARGEST = -1e-2
"""Log-probability of the likeliest token: none is certain."""


def natural_data(objective: Objective) -> DataKind:
    """What an objective most likely learns from, by what it declares."""
    if "rollouts" in objective.needs:
        return "prompts"
    if objective.grouped:
        return "pairs"
    return "ratings" if objective.kind == "reward" else "demonstrations"


def tiny_network(**changes: Any) -> Network:
    """A PaLM of about ten thousand parameters with 263 token ids, those of the tokeniser `bytes`.

    Args:
        changes: fields of `PaLMConfig` to set otherwise.
    """
    sizes: dict[str, Any] = {"vocab_size": 263, "d_model": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8}
    return PaLMConfig(**{**sizes, "max_length": 64, **changes}).build()


def tiny_experience(
    data: DataKind,
    needs: Iterable[str] = (),
    *,
    num_prompts: int = 4,
    completions_per_prompt: int | tuple[int, ...] = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Experience:
    """A batch of offline data, or a whole collection of rollouts before `prepare`.

    Args:
        data: which fields there are beside tokens, mask and loss_mask. All but `demonstrations` have group and row;
            `pairs`: rank, margin; `rankings` (of two to four answers, with ties): rank; `ratings`: rating; `unpaired`:
            label, mismatched (after all rows each prompt once more with another row's completion); `prompts`: ended,
            scores, rewards, and what is needed of old_logps, rollout_logps, ref_logps and values.
        needs: what the objective needs.
        num_prompts: prompts, each with as many answers as `data` has.
        completions_per_prompt: of `prompts`; a tuple gives each prompt its own number, in turn.
        seed: of everything.
        dtype: of log-probabilities, values, scores, ratings and margins.
    """
    assert data in get_args(DataKind), f"unknown data {data!r}: choose one of {', '.join(get_args(DataKind))}"
    generator = torch.Generator().manual_seed(seed)
    sizes = _group_sizes(data, num_prompts, completions_per_prompt)
    group = torch.repeat_interleave(torch.arange(num_prompts), torch.tensor(sizes))
    if data == "unpaired":
        group = torch.arange(num_prompts).repeat(2)
    experience = _rows(group, generator)
    num_rows = len(group)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    if data != "demonstrations":
        experience["group"], experience["row"] = group, torch.arange(num_rows)
    if data == "pairs":
        experience["rank"] = torch.arange(num_rows) % 2
        experience["margin"] = normal(num_rows).abs().repeat_interleave(2)[:num_rows]
    elif data == "rankings":
        experience["rank"] = torch.randint(0, 3, (num_rows,), generator=generator)
        experience["rank"][:2] = torch.tensor([1, 0])  # at least one pair
    elif data == "ratings":
        experience["rating"] = normal(num_rows)
    elif data == "unpaired":
        other = experience["mismatched"] = experience["row"] >= num_prompts
        experience["label"] = (group % 2 == 0) & ~other
        experience["group"] = torch.where(other, -1 - group, group)
        experience["row"] = torch.where(other, -1, experience["row"])
    elif data == "prompts":
        experience["ended"] = torch.arange(num_rows) % 3 != 1
        experience["rewards"] = {"first": normal(num_rows), "second": normal(num_rows)}
        experience["scores"] = experience["rewards"]["first"] + 0.5 * experience["rewards"]["second"]
        _annotate(experience, frozenset(needs), generator, dtype)
    return experience


def _group_sizes(data: DataKind, num_prompts: int, completions: int | tuple[int, ...]) -> list[int]:
    """Rows of each prompt."""
    cycle: tuple[int, ...] = {
        "pairs": (2,), "rankings": (2, 3, 4), "ratings": (2, 1), "demonstrations": (1,), "unpaired": (2,),
        "prompts": (completions,) if isinstance(completions, int) else completions,
    }[data]  # fmt: skip
    return [cycle[i % len(cycle)] for i in range(num_prompts)]


def _rows(group: Tensor, generator: torch.Generator) -> Experience:
    """tokens, mask, loss_mask of ragged rows; rows of a group share their prompt."""
    num_rows = len(group)
    prompts = torch.randint(2, 6, (int(group.max()) + 1,), generator=generator)[group]
    lengths = prompts + 1 + torch.randperm(num_rows, generator=generator) % 6  # of one token, too
    place = torch.arange(int(lengths.max()))[None]
    mask, completion = place < lengths[:, None], place >= prompts[:, None]
    by_prompt = torch.randint(1, 256, (int(group.max()) + 1, place.shape[1]), generator=generator)[group]
    tokens = torch.randint(1, 256, mask.shape, generator=generator)
    tokens = torch.where(completion, tokens, by_prompt)
    return Experience(tokens=torch.where(mask, tokens, 0), mask=mask, loss_mask=mask & completion)


def _annotate(experience: Experience, needs: frozenset[str], generator: torch.Generator, dtype: torch.dtype) -> None:
    """What the host records while collecting, for what an objective needs and nothing else."""
    mask = experience["loss_mask"]

    def field(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0)

    def normal() -> Tensor:
        return torch.randn(mask.shape, generator=generator, dtype=dtype)

    old = -torch.rand(mask.shape, generator=generator, dtype=dtype) * 3 - 0.1
    for need, name, values in (
        ("old_logps", "old_logps", old),
        ("rollout_logps", "rollout_logps", (old + 0.02 * normal()).clamp(max=LARGEST)),
        ("reference", "ref_logps", (old + 0.3 * normal()).clamp(max=LARGEST)),
        ("value", "values", normal()),
    ):
        if need in needs:
            experience[name] = field(values)


def tiny_output(objective: Objective, experience: Experience, *, seed: int = 0) -> Output:
    """What the networks would have computed: leaves with gradients, in the fields that the host fills.

    Log-probabilities scatter by about 0.2 nats around `old_logps` where a batch has them, and `ref_logps` by 0.3
    around the policy's; entropy, log_z, values and ref_logps are there when needed only, scores for reward models;
    what only the objective's own network gives is normal.

    Args:
        objective: says what it needs.
        experience: whose rows; of rollouts, after `prepare`.
        seed: of everything.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    mask, needs = experience["loss_mask"], objective.needs
    floats = [v.dtype for v in experience.values() if isinstance(v, Tensor) and v.is_floating_point()]
    dtype = floats[0] if floats else torch.float64

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    output = Output()
    if objective.kind == "reward":
        output.scores = normal(len(mask))
    else:
        output.logps = -torch.rand(mask.shape, generator=generator, dtype=dtype) * 3 - 0.1
        if "old_logps" in experience:
            output.logps = (experience["old_logps"] + 0.2 * normal(*mask.shape)).clamp(max=LARGEST)
        if "log_z" in needs:
            output.log_z = normal(*mask.shape)
    if objective.kind == "policy":
        assert output.logps is not None
        if "entropy" in needs:
            output.entropy = normal(*mask.shape).abs()
        if "value" in needs:
            output.values = normal(*mask.shape)
            if "values" in experience:
                output.values = experience["values"] + 0.3 * output.values
        if "reference" in needs and "rollouts" not in needs:
            output.ref_logps = torch.where(mask, (output.logps + 0.3 * normal(*mask.shape)).clamp(max=LARGEST), 0)
    for name in LEAVES:
        value = getattr(output, name)
        if value is not None:
            if value.dim() == 2:
                value = torch.where(mask, value, 0)
            setattr(output, name, value.detach().requires_grad_())
    if objective.extras:
        drawn = {name: torch.where(mask, normal(*mask.shape), 0) for name in sorted(objective.extras)}
        output.extra = {name: values.requires_grad_() for name, values in drawn.items()}
    return output


def tiny_batch(
    objective: Objective, data: DataKind | None = None, *, seed: int = 0, **options: Any
) -> tuple[Experience, Output]:
    """A batch as the objective's `loss` gets it (of rollouts: after `prepare`), with the networks' output.

    Args:
        objective: whose; a stateful one counts the collection.
        data: None: `natural_data(objective)`.
        seed: of everything.
        options: of `tiny_experience`.
    """
    experience = tiny_experience(data or natural_data(objective), objective.needs, seed=seed, **options)
    if "rollouts" in objective.needs:
        experience = objective.prepare(experience)
    return experience, tiny_output(objective, experience, seed=seed)
