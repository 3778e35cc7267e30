"""Losses taken apart and put side by side: what an objective makes of a batch, whole, cut, padded or filled up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_palm.objectives.base import Objective
from lit_palm.types import Experience, Loss, Output

__all__ = [
    "Elsewhere",
    "Evaluation",
    "alike",
    "as_terms",
    "call_loss",
    "cut",
    "evaluate",
    "garbled",
    "nested_alike",
    "output_of",
    "partitions",
    "tensors_of",
    "transformed",
    "widened",
    "with_filler",
    "with_filler_output",
]

# The batches are float64, where another order of sums shows at 1e-15. An objective may compute in float32 where it
# likes (1e-7); the defects looked for are larger than a hundredth.
TOLERANCE = 1e-6

MAKERS = {
    torch.arange, torch.as_tensor, torch.empty, torch.eye, torch.full, torch.linspace, torch.logspace, torch.ones,
    torch.rand, torch.randint, torch.randn, torch.randperm, torch.tensor, torch.zeros,
}  # fmt: skip


@dataclass
class Evaluation:
    """What an objective made of a batch: sums by term, and gradients by (term, field of the output)."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[tuple[str, str], Tensor] = field(default_factory=dict)


def as_terms(value: Any, what: str) -> dict[str, Tensor]:
    """Scalars by the name of their term; a lone one has the name ''."""
    terms = value if isinstance(value, dict) else {"": value}
    for name, term in terms.items():
        assert isinstance(term, Tensor) and term.dim() == 0, (
            f"{what}{f'[{name!r}]' if name else ''} must be a tensor without dimensions, a sum over the rows; it is "
            + (f"a tensor of shape {list(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}")
        )
    return terms


def call_loss(objective: Objective, output: Output, experience: Experience) -> Loss:
    """The loss, with an explanation when the batch lacks what it reads."""
    name = type(objective).__name__
    try:
        loss = objective.loss(output, experience)
    except (KeyError, AttributeError) as error:
        lacking = error.args[0] if error.args else ""
        if isinstance(error, AttributeError) and "this experience has no field" not in str(lacking):
            raise
        raise AssertionError(
            f"{name}.loss reads a field that its batches do not have ({lacking}); there are {', '.join(experience)}. "
            "Name it in `needs` if the host is to provide it, or say what it learns from: `data = 'pairs'` (rankings, "
            "ratings, demonstrations, unpaired, prompts) in the test class"
        ) from error
    assert isinstance(loss, Loss), f"{name}.loss must return a lit_palm.Loss, not a {type(loss).__name__}"
    for metric, pair in loss.metrics.items():
        assert len(pair) == 2 and all(isinstance(x, Tensor) and x.dim() == 0 for x in pair), (
            f"metric {metric!r} must be a pair of scalar tensors, (sum, count); what is logged is sum / count"
        )
    return loss


def evaluate(
    objective: Objective, experience: Experience, output: Output, parts: Sequence[Tensor] | None = None
) -> Evaluation:
    """Loss, weight, metrics and gradients of a batch, added up over the parts it is handed over in.

    Args:
        objective: whose.
        experience: of all rows.
        output: of all rows; gradients are taken with respect to its leaves.
        parts: rows of each micro-batch; None: the whole batch at once.
    """
    sums = Evaluation()
    whole: list[Tensor | None] = [None]
    for rows in parts or whole:
        part, seen = experience, output
        if rows is not None:
            part = experience.select(rows)
            seen = cut(output, rows, part["tokens"].shape[1])
        loss = call_loss(objective, seen, part)
        totals, weights = as_terms(loss.total, "Loss.total"), as_terms(objective.weight(part), "weight()")
        assert totals.keys() == weights.keys(), (
            f"Loss.total has the terms {sorted(totals)} and weight() has {sorted(weights)}: each term needs a weight "
            "of the same name"
        )
        for name, value in totals.items():
            sums.totals[name] = sums.totals[name] + value if name in sums.totals else value
            weight = weights[name].detach().double()
            sums.weights[name] = sums.weights[name] + weight if name in sums.weights else weight
        for name, (value, count) in loss.metrics.items():
            pair = torch.stack([value.detach().double(), count.detach().double()])
            sums.metrics[name] = sums.metrics[name] + pair if name in sums.metrics else pair
    leaves = {n: v for n, v in tensors_of(output).items() if v.requires_grad}
    for term, total in sums.totals.items():
        assert total.requires_grad, (
            f"the loss{f' term {term!r}' if term else ''} has no gradient: compute it from the fields of the output, "
            "also where no row counts (a sum over nothing keeps its graph, torch.zeros(()) has none)"
        )
        found = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
            sums.gradients[term, name] = torch.zeros_like(leaf) if gradient is None else gradient
    sums.totals = {name: total.detach() for name, total in sums.totals.items()}
    return sums


def cut(output: Output, rows: Tensor, width: int) -> Output:
    """The output's part for some rows, cut to a width; the graph stays."""
    named = tensors_of(output).items()
    return output_of({name: value[rows][:, :width] if value.dim() == 2 else value[rows] for name, value in named})


def tensors_of(output: Output) -> dict[str, Tensor]:
    """What an output holds, by name; what only one network gives under `extra/NAME`."""
    own = {place.name: getattr(output, place.name) for place in fields(output) if place.name != "extra"}
    found = {name: value for name, value in own.items() if value is not None}
    return found | {f"extra/{name}": value for name, value in (output.extra or {}).items()}


def output_of(tensors: dict[str, Tensor]) -> Output:
    """The output that holds what `tensors_of` gave."""
    extra = {name.removeprefix("extra/"): value for name, value in tensors.items() if name.startswith("extra/")}
    own: dict[str, Any] = {name: value for name, value in tensors.items() if "/" not in name}
    return Output(**own, extra=extra or None)


def alike(one: Any, other: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether two tensors are equal up to rounding, relative to the largest entry (of at least 1e-3)."""
    if one.shape != other.shape:
        return False
    one, other = one.detach().double(), other.detach().double()
    if not bool(torch.isfinite(other).all()):
        return bool(torch.equal(one, other))
    size = max(1e-3, float(other.abs().max())) if other.numel() else 1.0
    return bool(((one - other).abs() <= tolerance * size).all())


def nested_alike(one: Any, other: Any, tolerance: float = TOLERANCE) -> bool:
    """`alike` for nested dictionaries and lists of tensors, numbers and plain values; 0 asks for equal bits."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if tolerance == 0:
            return one.dtype == other.dtype and torch.equal(one, other)
        return alike(one, other, tolerance)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(nested_alike(one[k], other[k], tolerance) for k in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(nested_alike(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, float) and isinstance(other, float) and tolerance:
        return alike(torch.tensor(one), torch.tensor(other), tolerance)
    if type(one) is type(other) and type(one).__eq__ is object.__eq__ and hasattr(one, "__dict__"):
        return nested_alike(vars(one), vars(other), tolerance)
    return bool(one == other)


class Elsewhere(TorchFunctionMode):
    """Within it, tensors that are made without naming a device are on another one than all others.

    That is what happens on a GPU; here the device without data, `meta`, stands for the one that nobody asked for.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in MAKERS and kwargs.get("device") is None and not isinstance(next(iter(args), None), Tensor):
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


# ------------------------------------------------------------------------------------------ padding and filling


def widened(experience: Experience, left: int = 0, right: int = 0) -> Experience:
    """The same completions after `left` more tokens of prompt, and before `right` more columns of padding."""
    width = experience["tokens"].shape[1]
    wide = Experience(experience)
    for name, value in experience.items():
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape[1] == width:
            wide[name] = F.pad(value, (0, 0) * (value.dim() - 2) + (left, right))
    wide["tokens"][:, :left], wide["mask"][:, :left] = 9, True
    wide["tokens"] = torch.where(wide["mask"], wide["tokens"], 7)
    return wide


def garbled(experience: Experience, garbage: float) -> Experience:
    """The same with every per-token number outside `loss_mask` replaced."""
    mask = experience["loss_mask"]
    garbled = Experience(experience)
    for name, value in experience.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape == mask.shape:
            garbled[name] = torch.where(mask, value, garbage)
    return garbled


def transformed(output: Output, change: Callable[[Tensor], Tensor]) -> Output:
    """The output with every per-token field changed, as fresh leaves."""
    changed = {}
    for name, value in tensors_of(output).items():
        new = change(value.detach().clone()) if value.dim() == 2 else value.detach().clone()
        changed[name] = new.requires_grad_(value.requires_grad)
    return output_of(changed)


def partitions(objective: Objective, experience: Experience) -> list[list[Tensor]]:
    """Ways to cut a batch into micro-batches: each unit alone, one against the rest, halves in another order."""
    rows = torch.arange(experience.num_rows)
    units = [rows[i : i + 1] for i in rows.tolist()]
    if objective.grouped:
        units = [rows[experience["group"] == g] for g in experience["group"].unique()]
    half = len(units) // 2
    cuts = [units, [units[0], torch.cat(units[1:])], [torch.cat(units[half:]), torch.cat(units[:half])]]
    return cuts if len(units) > 1 else [[rows]]


def with_filler(experience: Experience) -> Experience:
    """One more row, alone in its group, with nothing to learn from."""
    filled = Experience()
    for name, value in experience.items():
        if isinstance(value, Tensor):
            filled[name] = torch.cat([value, value[:1]])
        elif isinstance(value, list):
            filled[name] = [*value, *value[:1]]
    filled["loss_mask"][-1] = False
    if "group" in filled:
        filled["group"][-1], filled["row"][-1] = filled["group"].max() + 1, -1
    return filled


def with_filler_output(output: Output) -> Output:
    """The networks' output for one more row, whose per-token fields are zero outside its (empty) `loss_mask`."""
    more = {}
    for name, value in tensors_of(output).items():
        row = torch.zeros_like(value[:1]) if value.dim() == 2 else value[:1]
        more[name] = torch.cat([value, row]).detach().requires_grad_(value.requires_grad)
    return output_of(more)
