"""Asynchronous rollouts: one collection behind, at the same time as the update, and resumed to the last bit."""

from __future__ import annotations

import copy
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import HalfPrecision, MixedPrecision

from lit_palm.callbacks import LastCheckpoint
from lit_palm.data.tokenizers import ByteTokenizer
from lit_palm.models.adapted import AdaptedNetwork
from lit_palm.models.lora import LoRA
from lit_palm.modules import overlap
from lit_palm.modules.overlap import Ahead
from lit_palm.rollout.continuous_engine import ContinuousEngine
from lit_palm.rollout.engine import CachedEngine
from lit_palm.rollout.engine_base import Generation
from lit_palm.rollout.sampling import Sampling, row_seeds
from tests.support import (
    apart,
    config,
    everything,
    language_model,
    policy,
    prompt_data,
    recorded,
    same,
    text_data,
    trainer,
    weights,
)

STEPS = 4
"""Of a collection of `policy`."""


def asynchronous(rollout: dict[str, Any] | None = None, **options: Any) -> Any:
    return policy(rollout={"asynchronous": True, **(rollout or {})}, **options)


class Seen(Callback):
    """What was logged with the first step of each collection."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.metrics.append({})

    def on_train_batch_end(self, run: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.metrics[-1] = {k: float(v) for k, v in run.callback_metrics.items()}


def test_each_collection_is_sampled_from_the_policy_one_collection_earlier(tmp_path: Path) -> None:
    """A slow account of the schedule: who sampled is found again from weights that were kept."""
    module = asynchronous()
    kept: list[dict[str, Any]] = []
    collected: list[Any] = []
    original = Ahead.take

    def take(self: Ahead, collection: int, rows: Any, ids: Any) -> Any:
        kept.append(weights(module))
        found = original(self, collection, rows, ids)
        collected.append((collection, rows, found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ahead, "take", take)
        seen = Seen()
        data = prompt_data(tmp_path)
        trainer(tmp_path, max_epochs=4, callbacks=[seen], enable_checkpointing=False).fit(module, datamodule=data)
    assert [c for c, _, _ in collected] == [0, 1, 2, 3] and collected[0][2] is None
    assert apart(kept[0], kept[1]) > 1e-3
    other = asynchronous()
    trainer(tmp_path, max_epochs=1, limit_train_batches=1).fit(other, datamodule=prompt_data(tmp_path))  # builds it
    for (collection, rows, found), before in zip(collected[1:], kept, strict=False):
        other.load_state_dict(before)
        prompts, own = module.rollouts._mine(collection, 0)
        assert torch.equal(own, rows)
        expected = CachedEngine().generate(
            other.networks["policy"], [p["prompt_ids"] for p in prompts], module.sampling,
            row_seeds(module.rollout.seed, collection, rows), pad_id=module.pad_id,
            eos_id=module.tokenizer.eos_id, decode=module.tokenizer.decode,
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(found.generation.completions, expected.completions, strict=True))
        assert found.step == STEPS * (collection - 1)
    assert [m["rollout/staleness"] for m in seen.metrics] == [0, STEPS, STEPS, STEPS]
    # the first is from the policy itself; later ones are weighted for the policy's having moved on
    assert seen.metrics[0]["rollout/logp_gap"] < 1e-5 and seen.metrics[0]["rollout/importance_ratio_max"] < 1.0001
    assert all(m["rollout/logp_gap"] > 1e-4 and m["rollout/importance_ratio_max"] > 1.001 for m in seen.metrics[1:])
    assert all(m["val/ratio"] == pytest.approx(1, abs=1e-4) for m in seen.metrics)  # of training to training


def test_what_is_too_stale_is_sampled_anew(tmp_path: Path) -> None:
    runs, plain_ppo = [], {"importance_cap": None}  # whose weights are 1 but for rounding
    for make in (
        lambda: policy(rollout={"old_logps": "trainer"}),
        lambda: asynchronous({"max_staleness": STEPS - 1}, ppo=plain_ppo),
        lambda: asynchronous({"max_staleness": STEPS}, ppo=plain_ppo),
    ):
        module = make()  # its weights are drawn when it is trained
        with recorded(module) as batches:
            trainer(tmp_path, max_epochs=2).fit(module, datamodule=prompt_data(tmp_path))
        runs.append(batches)
    plain, anew, stale = runs
    assert all(torch.equal(a, b) for a, b in zip(plain, anew, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain[:STEPS], stale[:STEPS], strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(plain[STEPS:], stale[STEPS:], strict=True))


SLOW = 0.8


class Slow(CachedEngine):
    def __init__(self) -> None:
        super().__init__()
        self.begun: list[float] = []

    def generate(self, *args: Any, **options: Any) -> Generation:
        self.begun.append(time.monotonic())
        time.sleep(SLOW)
        return super().generate(*args, **options)


class SlowSteps(Callback):
    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        time.sleep(SLOW / STEPS)
        self.ended.append(time.monotonic())


def test_sampling_and_learning_happen_at_once(tmp_path: Path) -> None:
    during = []
    for make in (policy, asynchronous):
        slow, engine = SlowSteps(), Slow()
        run = trainer(tmp_path, max_epochs=4, callbacks=[slow], enable_checkpointing=False)
        run.fit(make(engine=engine), datamodule=prompt_data(tmp_path, validation=None))
        # completions that were begun before the last step of the collection before them had ended
        during.append(sum(b < slow.ended[STEPS * k - 1] for k, b in enumerate(engine.begun[:4]) if k))
    assert during == [0, 3]


@pytest.mark.parametrize("steps", [2, STEPS, STEPS + 3])
def test_it_resumes_to_the_last_bit(steps: int, tmp_path: Path) -> None:
    """In the first collection, at its end, and in the second, which was sampled while the first was learned from."""

    def run(path: Path | None = None, **lengths: Any) -> Any:
        callbacks = [] if path else [LastCheckpoint(str(tmp_path / "run"))]
        made = trainer(tmp_path, callbacks=callbacks, **lengths)
        module = asynchronous()
        made.fit(module, datamodule=prompt_data(tmp_path), ckpt_path=None if path is None else str(path))
        return made

    whole = trainer(tmp_path, max_steps=3 * STEPS)
    whole.fit(asynchronous(), datamodule=prompt_data(tmp_path))
    run(max_steps=steps)
    saved = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["PromptData"]["rollouts"]["ahead"]
    assert saved and all(entry["tokens"].numel() > 8 for entry in saved.values())
    again = run(tmp_path / "run" / "last.ckpt", max_steps=3 * STEPS)
    same(everything(whole), everything(again))


class Broken(CachedEngine):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def generate(self, *args: Any, **options: Any) -> Generation:
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("the third call fails")
        return super().generate(*args, **options)


def test_a_failure_in_the_thread_is_the_runs_error(tmp_path: Path) -> None:
    module = asynchronous(engine=Broken())
    run = trainer(tmp_path, max_epochs=6)
    with pytest.raises(RuntimeError, match="the third call fails"):
        run.fit(module, datamodule=prompt_data(tmp_path, validation=None))
    assert STEPS <= run.global_step <= 2 * STEPS, "the collection under way at most"


class Fails(Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        raise KeyError("in the middle")


def test_nothing_goes_on_when_the_run_is_over(tmp_path: Path) -> None:
    for callbacks, error in (([], None), ([Fails()], KeyError)):
        module = asynchronous()
        run = trainer(tmp_path, max_epochs=1, callbacks=callbacks, enable_checkpointing=False)
        if error is None:
            run.fit(module, datamodule=prompt_data(tmp_path))
        else:
            with pytest.raises(error):
                run.fit(module, datamodule=prompt_data(tmp_path))
        assert module.rollouts.ahead._thread is None


class GivenUp(CachedEngine):
    """Waits with the second token of what it samples ahead until nobody wants it any more."""

    def __init__(self) -> None:
        super().__init__(weights="bf16")  # in the form of a PaLM's own, which no hook of the network sees
        self.begun, self.finished = threading.Event(), 0
        self.over: Any = None

    def generate(self, *args: Any, on_token: Any = None, **options: Any) -> Generation:
        told = 0

        def tell(row: int, token: int) -> None:
            nonlocal told
            told += 1
            self.begun.set()
            if told == 2:
                assert self.over().wait(60)
            on_token(row, token)

        found = super().generate(*args, on_token=None if on_token is None else tell, **options)
        self.finished += 1
        return found


def test_what_is_given_up_ends_in_the_middle_of_a_completion(tmp_path: Path) -> None:
    engine = GivenUp()

    class Ends(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            assert engine.begun.wait(60)
            raise KeyError("in the middle")

    module = asynchronous(engine=engine)
    engine.over = lambda: module.rollouts.ahead._over
    with pytest.raises(KeyError):
        trainer(tmp_path, max_epochs=1, callbacks=[Ends()], enable_checkpointing=False).fit(
            module, datamodule=prompt_data(tmp_path, validation=None)
        )
    assert engine.finished == 1 and module.rollouts.ahead._thread is None


@pytest.mark.parametrize("changes", [{"seed": 5}, {"num_prompts": 4}, {"num_prompts": 16}])
def test_completions_of_other_prompts_are_not_taken(changes: dict[str, int], tmp_path: Path) -> None:
    """A run that goes on with other settings has other prompts in the rows that were sampled ahead."""
    run = trainer(tmp_path, max_steps=STEPS, callbacks=[LastCheckpoint(str(tmp_path / "run"))])
    run.fit(asynchronous(), datamodule=prompt_data(tmp_path))
    module, seen = asynchronous(changes), Seen()
    again = trainer(tmp_path, max_epochs=2, callbacks=[seen])
    again.fit(module, datamodule=prompt_data(tmp_path), ckpt_path=str(tmp_path / "run" / "last.ckpt"))
    assert seen.metrics and seen.metrics[0]["rollout/staleness"] == 0


def test_a_copy_is_the_network_as_it_was() -> None:
    network = config(vocab_size=300).build().eval()
    copied, tokens = overlap._copy(network), torch.tensor([[5, 6]])
    before = network(tokens)
    with torch.no_grad():
        next(network.parameters()).add_(1.0)
    assert torch.equal(copied(tokens), before) and not torch.equal(network(tokens), before)


def test_rows_that_every_process_has_are_kept_once() -> None:
    rows, prompts = torch.tensor([4, 2]), [torch.tensor([7, 8]), torch.tensor([9])]
    found = Generation(
        [torch.tensor([1]), torch.tensor([2, 3])], [torch.zeros(1), torch.ones(2)], [True, False], ["eos", "length"]
    )
    once = overlap._joined([(rows, prompts, found)])
    twice = overlap._joined([(rows, prompts, found)] * 2)
    assert once["rows"].tolist() == [2, 4] and once["prompt_tokens"].tolist() == [9, 7, 8]
    assert all(torch.equal(once[k], twice[k]) if k != "reasons" else once[k] == twice[k] for k in once)


def test_a_copy_with_an_adapter_samples_alike_while_the_original_changes() -> None:
    pytest.importorskip("peft")
    shared = AdaptedNetwork(config(vocab_size=40).build(), {"policy": LoRA(rank=2)}, trained=["policy"])
    shared.to_empty(device=torch.device("cpu"))
    with torch.no_grad():
        for number, parameter in enumerate(shared.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.2)
    view, tokens = shared.view("policy"), torch.tensor([[5, 6, 7]])
    before = view(tokens)
    copied = overlap._copy(view)  # type: ignore[arg-type]
    assert torch.equal(copied(tokens), before)
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    assert torch.equal(copied(tokens), before) and not torch.equal(view(tokens), before)


def test_settings_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="max_staleness is 0"):
        asynchronous({"max_staleness": 0})
    with pytest.raises(ValueError, match="together with"):
        policy(rollout={"max_staleness": 2})
    with pytest.raises(ValueError, match="old_logps: engine"):
        asynchronous({"old_logps": "engine"})
    monkeypatch.setattr(overlap, "is_sharded", lambda network: True)
    with pytest.raises(ValueError, match="needs the whole policy on every process"):
        trainer(tmp_path, max_epochs=1).fit(asynchronous(), datamodule=prompt_data(tmp_path))


class Elsewhere(CachedEngine):
    """Has weights of its own, takes its time, and looks at those that are trained meanwhile."""

    apart = True

    def __init__(self) -> None:
        super().__init__()
        self.own: Any = None
        self.merged: list[bool] = []

    def update(self, version: str, write: Any) -> None:
        self.own = None

    def generate(self, network: Any, *args: Any, **options: Any) -> Generation:
        self.own = self.own or copy.deepcopy(network)
        self.merged.append(network.adapted.merged_role is not None)
        return super().generate(self.own, *args, **options)


def test_an_engine_elsewhere_leaves_an_adapter_that_is_trained_alone(tmp_path: Path) -> None:
    """With merge_to_sample, a thread beside training must not put it into the matrices that training reads."""
    pytest.importorskip("peft")
    start = language_model(network=config())
    trainer(tmp_path, max_steps=1, callbacks=[LastCheckpoint(str(tmp_path / "start"))]).fit(
        start, datamodule=text_data(tmp_path / "data", tokenizer=ByteTokenizer())
    )
    engine = Elsewhere()
    lora = LoRA(rank=2, merge_to_sample=True)
    module = asynchronous(engine=engine, network=str(tmp_path / "start" / "last.ckpt"), lora=lora, value_lr=None)
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=prompt_data(tmp_path, validation=None))
    assert len(engine.merged) >= 3 and not any(engine.merged)


@pytest.mark.parametrize("engine", [CachedEngine(), ContinuousEngine(max_batch_size=2)])
def test_the_default_dtype_is_left_alone_and_decides_nothing(engine: Any) -> None:
    """It belongs to all threads: under bf16-true training changes it at any time."""
    network = config(vocab_size=263).build().to(torch.bfloat16).eval()
    prompts, seeds = [torch.tensor([5, 6]), torch.tensor([7, 8, 9])], torch.tensor([1, 2])
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            with overlap._numerics(HalfPrecision("bf16-true")):
                assert torch.get_default_dtype() == dtype
                found.append(engine.generate(network, prompts, Sampling(max_new_tokens=6), seeds, pad_id=0, eos_id=1))
        finally:
            torch.set_default_dtype(torch.float32)
    for name in ("completions", "logps"):
        one, other = (getattr(generation, name) for generation in found)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with overlap._numerics(MixedPrecision("bf16-mixed", "cpu")):
        assert torch.is_autocast_enabled("cpu")
