"""Adafactor against two implementations we did not write and a slow loop; schedules against transformers'."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import start_processes
from torch.optim.lr_scheduler import LRScheduler

from lit_palm.optim import Adafactor, CosineWithWarmup, LinearWithWarmup, PaLMSchedule, fuse
from lit_palm.testing.processes import warm_context

SHAPES = [(7, 5), (11,), (3, 4, 6), (1,)]


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int, size: float = 1.0) -> None:
    """The same gradients for every optimiser; every third step is a spike, so that clipping of the update acts."""
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * size
        parameter.grad = (grad * (50 if step % 3 == 2 else 1)).to(parameter.dtype)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int) -> list[Tensor]:
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return [parameter.detach().clone() for parameter in params]


def slow_adafactor(params: list[nn.Parameter], steps: int, lr: float, beta1: float | None) -> list[list[float]]:
    """PaLM's update written out number by number, from the formulas of the papers."""
    results = []
    for index, parameter in enumerate(params):
        x = parameter.detach().flatten().tolist()
        v, m = [0.0] * len(x), [0.0] * len(x)
        for step in range(steps):
            set_gradients(params, step)
            g = params[index].grad.flatten().tolist()  # type: ignore[union-attr]
            beta2 = 1 - (step + 1) ** -0.8
            v = [beta2 * a + (1 - beta2) * (b * b + 1e-30) for a, b in zip(v, g, strict=True)]
            u = [b / math.sqrt(a) for a, b in zip(v, g, strict=True)]
            clip = max(1.0, math.sqrt(sum(a * a for a in u) / len(u)))
            scale = lr * max(1e-3, math.sqrt(sum(a * a for a in x) / len(x))) / clip
            u = [scale * a for a in u]
            m = u if beta1 is None else [beta1 * a + (1 - beta1) * b for a, b in zip(m, u, strict=True)]
            x = [a - lr**2 * a - b for a, b in zip(x, m, strict=True)]
        results.append(x)
    return results


@pytest.mark.parametrize("beta1", [0.9, None])
def test_palm_variant_equals_the_slow_loop(beta1: float | None) -> None:
    params = parameters()
    wanted = slow_adafactor(parameters(), 12, 0.05, beta1)
    for got, want in zip(run(Adafactor(params, lr=0.05, beta1=beta1), params, 12), wanted, strict=True):
        # float64 twice, in another order of summation
        torch.testing.assert_close(got.flatten(), torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_equals_torch_where_settings_coincide() -> None:
    """torch's is factored, has no momentum, decays by lr * weight_decay, and caps lr at 1/sqrt(step), which lr 0.01
    does not reach; on float64 its eps1 changes nothing that large gradients could show."""
    ours, theirs = parameters(), parameters()
    optimizer = Adafactor(ours, lr=0.01, beta1=None, weight_decay=0.1, factored=True)
    reference = torch.optim.Adafactor(theirs, lr=0.01, weight_decay=0.1, d=1.0)
    got, want = run(optimizer, ours, 12), run(reference, theirs, 12)
    # one difference remains: torch decays the parameter after taking its scale from before; so do we
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("beta1", [0.9, None])
def test_equals_transformers_where_settings_coincide(beta1: float | None) -> None:
    from transformers.optimization import Adafactor as Reference

    ours, theirs = parameters(), parameters()
    optimizer = Adafactor(ours, lr=0.05, beta1=beta1, weight_decay=0.0, factored=True)
    reference = Reference(theirs, lr=0.05, beta1=beta1, relative_step=False, scale_parameter=True)
    torch.testing.assert_close(run(optimizer, ours, 12), run(reference, theirs, 12), rtol=1e-10, atol=1e-12)


def test_factored_keeps_rows_and_columns_only() -> None:
    params = parameters()
    full, factored = Adafactor(params, beta1=None), Adafactor(params, beta1=None, factored=True)
    for optimizer in (full, factored):
        run(optimizer, params, 1)
    assert {k: tuple(v.shape) for k, v in full.state[params[2]].items()} == {"step": (), "exp_avg_sq": (3, 4, 6)}
    assert {k: tuple(v.shape) for k, v in factored.state[params[2]].items()} == {
        "step": (),
        "exp_avg_sq_row": (3, 4),
        "exp_avg_sq_col": (3, 6),
    }
    assert factored.state[params[1]]["exp_avg_sq"].shape == (11,)  # nothing to factor in a vector


def test_resume_continues_exactly_also_in_bfloat16() -> None:
    """torch casts a loaded state to the parameter's type: the moments of bfloat16 parameters would lose 16 bits."""
    for dtype in (torch.float32, torch.bfloat16):
        straight = parameters(dtype)
        want = run(Adafactor(straight), straight, 8)
        params = parameters(dtype)
        first = Adafactor(params)
        run(first, params, 4)
        assert first.state[params[0]]["exp_avg_sq"].dtype == torch.float32
        second = Adafactor(params)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for step in range(4, 8):
            set_gradients(params, step)
            second.step()
        assert all(torch.equal(a, b) for a, b in zip(params, want, strict=True))


def test_state_is_plain_and_loads_safely(tmp_path) -> None:
    params = parameters()
    optimizer = Adafactor(params)
    run(optimizer, params, 2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["state"][0]["step"] == 2


def test_groups_have_their_own_settings_and_untouched_parameters_stay() -> None:
    params = parameters()
    before = [parameter.detach().clone() for parameter in params]
    optimizer = Adafactor(
        [{"params": params[:1], "lr": 0.0, "weight_decay": 0.5}, {"params": params[1:2]}, {"params": params[2:]}],
        lr=0.1,
    )
    set_gradients(params, 0)
    params[2].grad = None
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(params, before, strict=True)]
    assert changed == [False, True, False, True]


def test_update_is_relative_to_the_parameter_and_zero_moves() -> None:
    """At the first step U is the sign of the gradient: the change is lr * RMS(X), or lr * eps2 for X = 0."""
    params = [nn.Parameter(torch.full((4,), 8.0)), nn.Parameter(torch.zeros(4))]
    for parameter in params:
        parameter.grad = torch.tensor([1.0, -2.0, 3.0, -1e-6])
    Adafactor(params, lr=0.01, beta1=None, weight_decay=0.0).step()
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(params[0].detach(), 8.0 - 0.08 * sign)
    torch.testing.assert_close(params[1].detach(), -1e-5 * sign)


def sharded_run(rank: int, folder: str) -> None:
    """One of two processes that each hold half of the rows of the same parameters, as under FSDP2."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = parameters()[:2]
    params = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in whole]
    for factored in (False, True):
        optimizer = Adafactor(params, lr=0.05, factored=factored)
        for step in range(4):
            set_gradients(whole, step)
            for p, q in zip(params, whole, strict=True):
                p.grad = distribute_tensor(q.grad, mesh, [Shard(0)])
            optimizer.step()
    full = [p.detach().redistribute(mesh, [Replicate()]) for p in params]
    assert all(isinstance(p, DTensor) for p in full)
    if rank == 0:
        torch.save([p.to_local() for p in full], f"{folder}/result.pt")
    distributed.destroy_process_group()


def test_sharded_parameters_give_the_same_as_whole_ones(tmp_path) -> None:
    warm_context()
    start_processes(sharded_run, (str(tmp_path),), nprocs=2, start_method="forkserver")
    params = parameters()[:2]
    for factored in (False, True):
        run(Adafactor(params, lr=0.05, factored=factored), params, 4)
    torch.testing.assert_close(torch.load(tmp_path / "result.pt"), [p.detach() for p in params], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"beta1": 1.0}, {"decay_rate": 0.8}, {"clip_threshold": 0.0}])
def test_settings_out_of_range_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"Adafactor: {next(iter(bad))} is"):
        Adafactor(parameters(), **bad)


def test_it_learns() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(64, 8)
    targets = inputs @ torch.randn(8, 1)
    model = nn.Linear(8, 1)
    optimizer = Adafactor(model.parameters(), lr=0.05)
    losses = []
    for _ in range(200):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]


# ---------------------------------------------------------------------------------------------------- schedules


def optimizer_of(*lrs: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in lrs], lr=1.0)


def trace(scheduler: LRScheduler, steps: int) -> list[float]:
    lrs = []
    for _ in range(steps):
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return lrs


def test_palm_schedule_is_the_papers() -> None:
    """With lr 1e-2 and 10,000 steps the paper's rule is 1/sqrt(max(k, 10000)) at step k = 1, 2, ..."""
    scheduler = PaLMSchedule(optimizer_of(1e-2), constant_steps=10000)
    for k in (1, 9999, 10000, 10001, 40000, 255000):
        assert 1e-2 * scheduler.factor(k - 1) == pytest.approx(1 / math.sqrt(max(k, 10000)), rel=1e-12)
    assert trace(PaLMSchedule(optimizer_of(2.0), constant_steps=4), 16)[15] == pytest.approx(2.0 * math.sqrt(4 / 16))


@pytest.mark.parametrize("ours, theirs", [(CosineWithWarmup, "cosine"), (LinearWithWarmup, "linear")])
def test_decay_equals_transformers(ours, theirs: str) -> None:
    """After warm-up; in warm-up transformers spends its first step at lr 0 and we do not."""
    from transformers import get_scheduler

    for warmup in (0, 5):
        want = trace(get_scheduler(theirs, optimizer_of(0.3), num_warmup_steps=warmup, num_training_steps=20), 20)
        got = trace(ours(optimizer_of(0.3), warmup_steps=warmup, max_steps=20), 20)
        assert got[warmup:] == pytest.approx(want[warmup:], rel=1e-9)
        assert got[:warmup] == pytest.approx([0.3 * (k + 1) / (warmup + 1) for k in range(warmup)])


@pytest.mark.parametrize("schedule", [CosineWithWarmup, LinearWithWarmup])
def test_floor_holds_at_the_end_and_beyond(schedule) -> None:
    lrs = trace(schedule(optimizer_of(1.0), warmup_steps=2, max_steps=10, min_ratio=0.1), 15)
    assert lrs[10:] == pytest.approx([0.1] * 5)
    assert all(a > b for a, b in itertools.pairwise(lrs[2:11])) and max(lrs) == lrs[2] == 1.0


def test_every_group_keeps_its_own_base() -> None:
    scheduler = LinearWithWarmup(optimizer_of(1.0, 0.01), max_steps=4)
    trace(scheduler, 2)
    assert scheduler.get_last_lr() == pytest.approx([0.5, 0.005])


@pytest.mark.parametrize("schedule", [CosineWithWarmup, LinearWithWarmup])
def test_the_host_may_say_how_long_the_run_is(schedule) -> None:
    waiting = schedule(optimizer_of(1.0), warmup_steps=1)
    assert waiting.needs_total_steps
    waiting.set_total_steps(8)
    assert not waiting.needs_total_steps
    assert trace(waiting, 8) == trace(schedule(optimizer_of(1.0), warmup_steps=1, max_steps=8), 8)

    stated = schedule(optimizer_of(1.0), max_steps=8)
    stated.set_total_steps(80)
    assert stated.max_steps == 8
    assert not PaLMSchedule(optimizer_of(1.0)).needs_total_steps

    unknown = schedule(optimizer_of(1.0))
    with pytest.raises(ValueError, match="set the schedule's max_steps"):
        unknown.set_total_steps(float("inf"))
    unknown.optimizer.step()
    with pytest.raises(ValueError, match="max_steps is not known"):
        unknown.step()


def test_resume_keeps_the_position_and_takes_the_shape_from_the_configuration() -> None:
    make = {"warmup_steps": 2, "max_steps": 12}
    want = trace(CosineWithWarmup(optimizer_of(0.5), **make), 12)
    first = CosineWithWarmup(optimizer_of(0.5), **make)
    trace(first, 5)
    second = CosineWithWarmup(optimizer_of(0.5), **make)
    second.load_state_dict(first.state_dict())
    assert trace(second, 7) == pytest.approx(want[5:], rel=1e-12)
    longer = CosineWithWarmup(optimizer_of(0.5), warmup_steps=2, max_steps=40)
    longer.load_state_dict(first.state_dict())
    assert longer.optimizer.param_groups[0]["lr"] == 0.5 * longer.factor(5) > want[5]


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda o: PaLMSchedule(o, constant_steps=0), "constant_steps"),
        (lambda o: CosineWithWarmup(o, warmup_steps=-1), "warmup_steps"),
        (lambda o: LinearWithWarmup(o, max_steps=0), "max_steps"),
        (lambda o: CosineWithWarmup(o, max_steps=5, min_ratio=2.0), "min_ratio"),
    ],
)
def test_bad_settings_are_named(make, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        make(optimizer_of(1.0))


def test_yaml_names_optimizer_and_schedule() -> None:
    from jsonargparse import ArgumentParser
    from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--optimizer", type=OptimizerCallable)
    parser.add_argument("--scheduler", type=LRSchedulerCallable)
    arguments = [
        "--optimizer=lit_palm.optim.Adafactor",
        "--optimizer.lr=0.02",
        "--optimizer.weight_decay=null",
        "--scheduler=CosineWithWarmup",
        "--scheduler.warmup_steps=3",
    ]
    made = parser.instantiate_classes(parser.parse_args(arguments))
    optimizer = made.optimizer([nn.Parameter(torch.zeros(1))])
    scheduler = made.scheduler(optimizer)
    assert isinstance(optimizer, Adafactor) and isinstance(scheduler, CosineWithWarmup)
    assert scheduler.base_lrs == [0.02] and scheduler.needs_total_steps


# ---------------------------------------------------------------------------------------------------- fused kernels


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_steps_are_those_of_the_loop(kind: type[torch.optim.Optimizer], dtype: torch.dtype) -> None:
    """Up to rounding: a unit in the last place of the parameters a step."""
    ours, theirs = parameters(dtype), parameters(dtype)
    fused, plain = (kind(p, lr=1e-2, weight_decay=0.1) for p in (ours, theirs))
    fuse(fused)
    assert fused.param_groups[0]["fused"] is True and plain.param_groups[0]["fused"] is None
    tolerance = 5 * torch.finfo(dtype).eps
    for mine, expected in zip(run(fused, ours, 5), run(plain, theirs, 5), strict=True):
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("setting", [{"fused": False}, {"foreach": True}, {"foreach": False}, {"capturable": True}])
def test_what_the_configuration_says_of_kernels_stays(setting: dict[str, bool]) -> None:
    optimizer = torch.optim.AdamW(parameters(), **setting)
    before = dict(optimizer.param_groups[0])
    fuse(optimizer)
    assert optimizer.param_groups[0] == before


def test_other_optimisers_are_left_alone() -> None:
    for optimizer in (torch.optim.SGD(parameters()), Adafactor(parameters()), torch.optim.NAdam(parameters())):
        fuse(optimizer)
        assert not optimizer.param_groups[0].get("fused")


def test_a_checkpoint_without_fused_kernels_goes_on_without() -> None:
    """So that a run that began before goes on bit by bit as it would have."""
    expected_params, params = parameters(), parameters()
    before, after = (torch.optim.AdamW(p, lr=1e-2) for p in (expected_params, params))
    middle = run(before, expected_params, 3)
    state = copy.deepcopy(before.state_dict())
    fuse(after)
    with torch.no_grad():
        for parameter, value in zip(params, middle, strict=True):
            parameter.copy_(value)
    after.load_state_dict(state)
    assert not after.param_groups[0]["fused"]
    for mine, expected in zip(run(after, params, 3), run(before, expected_params, 3), strict=True):
        assert torch.equal(mine, expected)
