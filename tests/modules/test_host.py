"""The optimiser step: its gradient, its clipping, what it leaves alone, its schedule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor

from lit_palm.objectives import PPO, LanguageModeling
from tests.support import (
    apart,
    config,
    demonstration_data,
    language_model,
    policy,
    prompt_data,
    recorded,
    text_data,
    trainer,
    weights,
)


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


class Snapshots(Callback):
    """Weights before the first step and after each one."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append(weights(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.weights.append(weights(pl_module))


def moved(one: dict[str, Tensor], other: dict[str, Tensor], prefix: str = "") -> float:
    """Norm of the step from one to the other."""
    return torch.stack([(other[k] - one[k]).norm() for k in one if k.startswith(prefix)]).norm().item()


def fit(folder: Path, module: Any, data: Any, **options: Any) -> tuple[list[dict[str, Tensor]], Any]:
    snapshots = Snapshots()
    run = trainer(folder, callbacks=[snapshots], enable_checkpointing=False, **options)
    run.fit(module, datamodule=data)
    return snapshots.weights, run


def test_the_gradient_is_that_of_the_mean_over_tokens(tmp_path: Path) -> None:
    module = language_model(optimizer=sgd)
    data = demonstration_data(tmp_path, shuffle=False)
    (before, after), run = fit(tmp_path, module, data, max_steps=1)
    # the same by plain torch: cross-entropy over the completion's tokens
    batch = next(iter(data.train_dataloader()))
    network = copy.deepcopy(module.networks["policy"])
    network.load_state_dict({k.removeprefix("networks.policy."): v for k, v in before.items()})
    logits = network(batch["tokens"])[:, :-1]
    target = batch["tokens"].masked_fill(~batch["loss_mask"], -100)[:, 1:]
    F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100).backward()
    for name, parameter in network.named_parameters():
        expected = before[f"networks.policy.{name}"] - parameter.grad
        torch.testing.assert_close(after[f"networks.policy.{name}"], expected, rtol=1e-5, atol=1e-6)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), 1e9)
    assert run.callback_metrics["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)  # float32 sums


def test_clipping_bounds_the_step_and_the_norm_is_logged_before_it(tmp_path: Path) -> None:
    (before, after), run = fit(
        tmp_path, language_model(optimizer=sgd), text_data(tmp_path), max_steps=1, gradient_clip_val=0.01
    )
    assert run.callback_metrics["grad_norm"].item() > 0.1
    assert moved(before, after) == pytest.approx(0.01, rel=1e-3)  # clip_grad_norm_ adds 1e-6 to the norm


def test_clipping_by_value(tmp_path: Path) -> None:
    (before, after), _ = fit(
        tmp_path, language_model(optimizer=sgd), text_data(tmp_path), max_steps=1, gradient_clip_val=1e-3,
        gradient_clip_algorithm="value",
    )  # fmt: skip
    largest = max(float((after[k] - before[k]).abs().max()) for k in before)
    assert largest == pytest.approx(1e-3, rel=1e-2)  # weights of size 1 hold a step of 1e-3 to about 1e-4 of it


@pytest.mark.parametrize("per_network", [False, True])
def test_networks_are_clipped_together_or_each_by_its_own(per_network: bool, tmp_path: Path) -> None:
    module = policy(optimizer=sgd, value_lr=None, clip_per_network=per_network)
    (before, after), run = fit(tmp_path, module, prompt_data(tmp_path), max_steps=1, gradient_clip_val=1e-3)
    parts = [moved(before, after, f"networks.{role}.") for role in ("policy", "value")]
    # weights of size 1 hold a step this small to about 1e-7 each: a per cent of the whole
    if per_network:
        assert parts == pytest.approx([1e-3, 1e-3], rel=2e-2)
    else:
        assert torch.tensor(parts).norm().item() == pytest.approx(1e-3, rel=2e-2)
        assert min(parts) < 0.9e-3
    assert run.callback_metrics["grad_norm"].item() > 1e-2


def test_each_group_has_its_own_learning_rate_and_vectors_are_not_decayed(tmp_path: Path) -> None:
    module = policy()
    _, run = fit(tmp_path, module, prompt_data(tmp_path), max_steps=1)
    names = {id(p): n for n, p in module.named_parameters()}
    found = {names[id(p)]: (g["lr"], g["weight_decay"]) for g in run.optimizers[0].param_groups for p in g["params"]}
    assert found.keys() == {n for n, _ in module.named_parameters()}
    for name, (lr, decay) in found.items():
        assert lr == (5e-3 if name.startswith("networks.value") else 3e-3), name
        assert decay == (0.1 if dict(module.named_parameters())[name].dim() > 1 else 0.0), name


def test_a_warm_up_of_the_value_leaves_the_policy_alone(tmp_path: Path) -> None:
    module = policy(ppo={"value_warmup": 1})
    states, _ = fit(tmp_path, module, prompt_data(tmp_path), max_epochs=2)
    assert len(states) == 9
    for state in states[1:5]:  # weight decay would show here as well
        assert all(torch.equal(state[k], states[0][k]) for k in state if k.startswith("networks.policy."))
        assert moved(states[0], state, "networks.value.") > 0
    assert moved(states[4], states[5], "networks.policy.") > 0, "the second collection trains it"


def test_a_step_that_goes_too_far_is_dropped_and_ends_the_collection(tmp_path: Path) -> None:
    # the first step of a collection finds no divergence; a bound of next to nothing stops every second one
    module = policy(ppo={"max_update_kl": 1e-12})
    with recorded(module) as batches:
        states, run = fit(tmp_path, module, prompt_data(tmp_path), max_epochs=3)
    assert len(batches) == 6 and run.global_step == 6, "two of the four minibatches of each of three collections"
    for first in (0, 2, 4):
        assert moved(states[first], states[first + 1]) > 0
        assert moved(states[first + 1], states[first + 2]) == 0
    assert module.objective.num_collections == 3
    assert module.rollouts.loader.collection == 2, "counted when the next one is asked for"


def test_schedules_advance_by_optimiser_step(tmp_path: Path) -> None:
    rates: list[float] = []

    def constant(params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.5)

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def halved(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    module = language_model(optimizer=constant, scheduler=halved)
    run = trainer(tmp_path, callbacks=[Rates()], enable_checkpointing=False, max_steps=3, accumulate_grad_batches=2)
    run.fit(module, datamodule=text_data(tmp_path))
    assert rates == [0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


def test_dropout_is_a_function_of_the_step(tmp_path: Path) -> None:
    def trained(noise: int) -> dict[str, Tensor]:
        module = language_model(network=config(dropout=0.2))

        class Noise(Callback):
            def on_train_batch_end(self, *args: Any) -> None:
                torch.rand(noise)  # somebody else draws from the generator

        torch.manual_seed(7)
        fit_run = trainer(tmp_path, callbacks=[Noise()], enable_checkpointing=False, max_steps=3)
        fit_run.fit(module, datamodule=text_data(tmp_path))
        return weights(module)

    assert apart(trained(0), trained(5)) == 0


def test_an_objective_of_another_kind_is_refused() -> None:
    match = r"runs objectives of kind 'language_model'; PPO is of kind 'policy'.*LitPolicy"
    with pytest.raises(ValueError, match=match):
        language_model(objective=PPO())


def test_a_need_that_nothing_provides_is_named() -> None:
    class Wishful(PPO):
        needs = frozenset({"rollouts", "reward", "critic"})

    with pytest.raises(ValueError, match=r"Wishful needs 'critic', which nothing provides: needs may hold rollouts, "):
        policy(objective=Wishful())


def test_a_kind_that_nothing_runs_is_named() -> None:
    class Misspelt(PPO):
        kind = "polcy"

    with pytest.raises(ValueError, match=r"Misspelt is of kind 'polcy', which nothing runs: choose one of language_m"):
        policy(objective=Misspelt())
    with pytest.raises(ValueError, match=r"LitLanguageModel runs .* PPO is of kind 'policy': use LitPolicy"):
        language_model(objective=PPO())


def test_a_loss_that_is_no_loss_is_named(tmp_path: Path) -> None:
    class Bare(LanguageModeling):
        def loss(self, output: Any, experience: Any) -> Any:
            return super().loss(output, experience).total

    with pytest.raises(ValueError, match=r"Bare.loss\(\) returned a Tensor: it must return lit_palm.Loss"):
        fit(tmp_path, language_model(objective=Bare()), text_data(tmp_path), max_steps=1)
