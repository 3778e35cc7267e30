"""A step whose loss or gradient is not finite moves nothing, is counted, and too many in a row end the run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lit_palm.callbacks import LastCheckpoint, NonFiniteGuard
from lit_palm.optim import CosineWithWarmup
from tests.callbacks.runs import Run
from tests.support import apart, everything, language_model, policy, prompt_data, same, text_data, trainer, weights


def poison(module: Any, at: Collection[int], value: float = float("nan"), gradient: bool = False) -> list[dict]:
    """Spoil the loss of some micro-batches (or the gradient alone); gives the states after every optimiser step."""
    original, count = module.training_step, iter(range(10**6))

    def step(batch: Any, batch_idx: int) -> Tensor:
        loss = original(batch, batch_idx)
        if next(count) not in at:
            return loss
        if gradient:
            weight = next(module.networks.parameters())
            weight.grad = None if weight.grad is None else weight.grad
            weight.register_post_accumulate_grad_hook(_spoiler(value))
            return loss
        module.finite.saw(loss * value)
        return loss * value

    module.training_step = step
    return []


def _spoiler(value: float) -> Callable[[Tensor], None]:
    done = []

    def hook(weight: Tensor) -> None:
        if not done:
            done.append(True)
            assert weight.grad is not None
            weight.grad.view(-1)[0] = value

    return hook


class Watch(LastCheckpoint):
    """Weights and optimiser after every step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.states: list[dict[str, Any]] = []
        self.counts: list[float] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.lightning_module.between_steps:
            self.states.append(everything(trainer))
            self.counts.append(float(trainer.callback_metrics["guard/skipped_steps"]))


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return CosineWithWarmup(optimizer, warmup_steps=2, max_steps=20)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize(
    "flags",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "clip_per_network": True},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value", "accumulate_grad_batches": 2},
    ],
    ids=["plain", "norm", "value"],
)
def test_a_spoiled_micro_batch_moves_nothing(value: float, gradient: bool, flags: dict, tmp_path: Path) -> None:
    flags = dict(flags)
    module = language_model(scheduler=cosine, clip_per_network=flags.pop("clip_per_network", False))
    poison(module, {4}, value, gradient)  # the first of the two micro-batches of the third step
    watch = Watch(tmp_path)
    trainer(tmp_path, callbacks=[watch], max_steps=5, **flags).fit(module, datamodule=text_data(tmp_path, batch_size=2))
    before, after, following = watch.states[1:4]
    for part in ("weights", "optimizer"):  # the schedule sets the learning rate; nothing else moved
        one, other = before[part], after[part]
        if part == "optimizer":
            one, other = one["state"], other["state"]
        same(one, other, part)
    assert after["step"] == before["step"] + 1 and after["schedulers"] != before["schedulers"]
    assert not torch.equal(*(next(iter(s["weights"].values())) for s in (after, following)))
    assert all(t.isfinite().all() for t in watch.states[-1]["weights"].values())
    assert watch.counts == [0, 0, 1, 1, 1]
    assert module.finite.in_a_row == 0


def test_too_many_in_a_row_end_the_run_with_the_reason(tmp_path: Path) -> None:
    module = policy()
    poison(module, {0, 2, 3, 4})
    run = trainer(tmp_path, callbacks=[NonFiniteGuard(max_in_a_row=3)], max_epochs=3)
    with pytest.raises(RuntimeError, match=r"step 4: the loss and the gradient of policy, value were not finite, in 3"):
        run.fit(module, datamodule=prompt_data(tmp_path))
    assert module.finite.skipped == 4


def test_the_network_whose_gradient_is_at_fault_is_named(tmp_path: Path) -> None:
    module = policy()
    for p in module.networks.parameters():
        assert p is not None
    original = module.training_step

    def step(batch: Any, batch_idx: int) -> Tensor:
        loss = original(batch, batch_idx)
        weight = next(module.networks["value"].parameters())
        weight.register_post_accumulate_grad_hook(_spoiler(float("inf")))
        return loss

    module.training_step = step
    run = trainer(tmp_path, callbacks=[NonFiniteGuard(max_in_a_row=1)], max_epochs=1)
    with pytest.raises(RuntimeError, match=r"step 0: the gradient of value was not finite, in 1"):
        run.fit(module, datamodule=prompt_data(tmp_path))


def test_without_a_limit_and_without_the_guard(tmp_path: Path) -> None:
    module = language_model()
    poison(module, range(100))
    trainer(tmp_path, callbacks=[NonFiniteGuard(max_in_a_row=None)], max_steps=12).fit(
        module, datamodule=text_data(tmp_path)
    )
    assert module.finite.skipped == module.finite.in_a_row == 12
    module = language_model()
    poison(module, range(100))
    trainer(tmp_path, callbacks=[NonFiniteGuard(skip=False)], max_steps=2).fit(module, datamodule=text_data(tmp_path))
    assert not all(p.isfinite().all() for p in module.networks.parameters()), "the guard is what protects"


@pytest.mark.parametrize("kill", [2, 3, 4])
def test_the_counts_resume_exactly(kill: int, tmp_path: Path) -> None:
    def run(first: int, path: Path | None = None, **flags: Any) -> Any:
        module = language_model()
        poison(module, {n - first for n in (1, 2, 3, 5)})
        last = LastCheckpoint(str(tmp_path / str(kill)))
        run = trainer(tmp_path, callbacks=[last], **{"max_steps": 7, **flags})
        run.fit(module, datamodule=text_data(tmp_path), ckpt_path=path)
        return module.finite.state_dict(), everything(run)

    straight = run(0)
    first, _ = run(0, max_steps=kill)
    assert first == {"skipped": min(kill - 1, 3), "in_a_row": min(kill - 1, 3)}
    same(straight, run(kill, tmp_path / str(kill) / "last.ckpt"))
    assert straight[0] == {"skipped": 4, "in_a_row": 0}


def test_the_scaler_of_16_mixed_lowers_its_scale_and_is_not_counted_in_a_row(tmp_path: Path) -> None:
    def scaled() -> Any:
        plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**4))
        return trainer(tmp_path, plugins=[plugin], callbacks=[NonFiniteGuard(max_in_a_row=2)], max_steps=10), plugin

    module = language_model()
    poison(module, {2, 3, 4}, float("inf"), gradient=True)
    run, plugin = scaled()
    run.fit(module, datamodule=text_data(tmp_path))
    # 16 -> 8 -> 4 -> 2
    assert plugin.scaler.get_scale() == 2.0 and module.finite.state_dict() == {"skipped": 3, "in_a_row": 0}
    assert all(p.isfinite().all() for p in module.networks.parameters())
    module = language_model()
    poison(module, {2, 3}, float("nan"))  # a loss that is no number is nobody's overflow
    with pytest.raises(RuntimeError, match="the loss and the gradient of policy were not finite, in 2"):
        scaled()[0].fit(module, datamodule=text_data(tmp_path))
    module = language_model()
    poison(module, range(100), float("inf"), gradient=True)  # the scale is used up: 16, 8, 4, 2, then 1
    with pytest.raises(RuntimeError, match="step 5: the gradient of policy was not finite, in 2"):
        scaled()[0].fit(module, datamodule=text_data(tmp_path))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="NonFiniteGuard: max_in_a_row is 0"):
        NonFiniteGuard(max_in_a_row=0)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("sharded", marks=pytest.mark.slow)])
def test_what_one_rank_of_two_finds_both_skip(strategy: str, tmp_path: Path) -> None:
    """Each rank reads a half of what one process reads, and stays with the same weights as it."""
    spoilt = {"spoils": [1, [2, 3, 6]], "strategy": strategy, "devices": 2}  # its micro-batches, two a step
    settings = {"flags": {"max_steps": 5, "accumulate_grad_batches": 2}, "result": "end.pt", **spoilt}
    run = Run(tmp_path / "run", settings)
    assert run.ends(120) == 0, run.stderr
    two = torch.load(tmp_path / "run" / "end.pt")
    module = language_model()
    poison(module, {2, 6})
    one = trainer(tmp_path, max_steps=5, accumulate_grad_batches=2)
    one.fit(module, datamodule=text_data(tmp_path, batch_size=4))
    assert two["finite"] == module.finite.state_dict() == {"skipped": 2, "in_a_row": 0}
    assert apart(weights(module), two["weights"]) < 2e-5


def test_a_gradient_that_is_only_large_is_taken(tmp_path: Path) -> None:
    # its sum of squares overflows, and clipping by value takes care of it
    module = language_model()
    poison(module, {2}, 1e30, gradient=True)
    run = trainer(tmp_path, max_steps=4, gradient_clip_val=0.5, gradient_clip_algorithm="value")
    run.fit(module, datamodule=text_data(tmp_path))
    assert module.finite.skipped == 0 and all(p.isfinite().all() for p in module.networks.parameters())
