"""A network that comes with its objective: one around another, with outputs of its own and a copy that follows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lit_palm.callbacks.going_back import restore, take
from lit_palm.models.base import Cache, Head, Network, NetworkConfig
from lit_palm.models.logprobs import TokenLogProbs
from lit_palm.models.lora import LoRA
from lit_palm.models.palm import PaLM, PaLMConfig
from lit_palm.models.weights import Fresh, fill, fresh_seed, give_memory, local
from lit_palm.modules import LitLanguageModel, LitPolicy, load_network, read_checkpoint
from lit_palm.modules.checkpoint import config_from_dict, config_to_dict
from lit_palm.objectives import Objective
from lit_palm.types import Experience, Loss, Output
from tests.support import apart, config, demonstration_data, everything, trainer


@dataclass
class GuessingConfig(NetworkConfig):
    """A language model that also guesses a number at every token."""

    CHANGEABLE: ClassVar[frozenset[str]] = frozenset({"start"})

    base: NetworkConfig
    start: str | None = None
    every: int = 2
    whole: bool = False
    """It cannot be made in parts, like a network of another library."""

    @property
    def starts(self) -> dict[str, str]:
        return {} if self.start is None else {"base.": self.start}

    @property
    def vocab_size(self) -> int | None:  # type: ignore[override]
        return self.base.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int | None) -> None:
        self.base.vocab_size = value

    @property
    def max_length(self) -> int:  # type: ignore[override]
        return self.base.max_length

    @property
    def d_model(self) -> int:  # type: ignore[override]
        return self.base.d_model

    def build(self) -> Guessing:
        return Guessing(self)


class Guessing(Network):
    """The guess of a slow copy of the head is what the head learns to be one above."""

    config: GuessingConfig

    def __init__(self, config: GuessingConfig) -> None:
        super().__init__()
        self.config, self.base = config, config.base.build()
        self.in_parts = not config.whole  # type: ignore[misc]
        device = torch.get_default_device()
        with torch.device("meta"):
            self.guess = nn.Linear(config.d_model, 1, bias=False)
            self.slow_guess = nn.Linear(config.d_model, 1, bias=False).requires_grad_(False)
        fill(self, Fresh(self, fresh_seed()), only=give_memory(self, device))

    def initial_std(self, name: str) -> float | None:
        return self.base.initial_std(name.removeprefix("base.")) if name.startswith("base.") else 0.3

    def drawn_as(self, name: str) -> str:
        return name.removeprefix("slow_")

    @property
    def extras(self) -> frozenset[str]:
        return frozenset({"guess", "slow_guess"})

    def blocks(self) -> list[nn.Module]:
        return self.base.blocks()

    def new_cache(self, num_rows: int, length: int) -> Cache:
        return self.base.new_cache(num_rows, length)

    def forward(self, tokens: Tensor, *, head: Head | None = None, **options: Any) -> Any:
        if not (isinstance(head, TokenLogProbs) and head.extras):
            return self.base(tokens, head=head, **options)

        def both(hidden: Tensor, weight: Tensor, scale: float) -> dict[str, Tensor]:
            found = head(hidden, weight, scale)
            place, before = head.places()
            states = hidden.flatten(0, 1)[before]
            for name in head.extras:
                values = F.linear(states, local(getattr(self, name).weight)).squeeze(-1)
                empty = values.new_zeros(head.targets.numel())
                found[name] = empty.index_copy(0, place, values).view(head.targets.shape)
            return found

        return self.base(tokens, head=both, **options)

    def follow(self, before: int, now: int) -> None:
        for _ in range(now // self.config.every - before // self.config.every):
            local(self.slow_guess.weight).lerp_(local(self.guess.weight), 0.5)


class Guess(Objective):
    """Imitate, and guess one more than the slow copy does."""

    def __init__(self, kind: str = "policy") -> None:
        self.kind = kind  # type: ignore[misc,assignment]

    @property
    def extras(self) -> frozenset[str]:
        return frozenset({"guess", "slow_guess"})

    def weight(self, experience: Experience) -> Tensor:
        return experience["loss_mask"].sum()

    def loss(self, output: Output, experience: Experience) -> Loss:
        assert output.logps is not None and output.extra is not None and output.extra.keys() == self.extras
        mask = experience["loss_mask"]
        above = output.extra["guess"] - output.extra["slow_guess"].detach() - 1
        squared = torch.where(mask, above.square(), 0).sum()
        return Loss(squared - output.logps.sum(), {"squared": (squared.detach(), mask.sum())})


def network(**changes: Any) -> GuessingConfig:
    return GuessingConfig(**{"base": config(), **changes})


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05)


def module(kind: str = "policy", **changes: Any) -> Any:
    torch.manual_seed(0)
    cls: Any = LitPolicy if kind == "policy" else LitLanguageModel
    return cls(network(**changes), objective=Guess(kind), optimizer=sgd)


@pytest.mark.parametrize("kind", ["policy", "language_model"])
def test_the_objective_gets_what_only_its_network_gives(kind: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=4)
    run.fit(made := module(kind), datamodule=demonstration_data(tmp_path))
    assert run.callback_metrics["squared"] < 0.9, "it starts at 1"
    body = made.networks["policy"]
    assert not torch.equal(body.guess.weight, body.slow_guess.weight)


def test_another_network_is_refused_before_the_first_step(tmp_path: Path) -> None:
    plain = LitPolicy(config(), objective=Guess())
    with pytest.raises(ValueError, match="Guess reads guess, slow_guess, which PaLMConfig does not give: name the net"):
        trainer(tmp_path, max_epochs=1).fit(plain, datamodule=demonstration_data(tmp_path))


def test_adapters_are_refused_where_they_would_freeze_what_the_objective_trains() -> None:
    with pytest.raises(ValueError, match=r"Guess trains a network of its own, .*: leave model.lora out"):
        LitPolicy(network(), objective=Guess(), lora=LoRA())


@pytest.mark.parametrize("ways", [1, 2])
def test_a_resumed_run_moves_the_copy_when_it_would_have(ways: int, tmp_path: Path) -> None:
    """From a checkpoint of every step, also the one after which a move is due: the same bits."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    def fit(resume: Path | None = None, callbacks: Any = ()) -> Trainer:
        run = trainer(tmp_path, max_epochs=4, accumulate_grad_batches=ways, callbacks=[*callbacks])
        run.fit(module(), datamodule=demonstration_data(tmp_path, batch_size=2), ckpt_path=resume)
        return run

    saving = ModelCheckpoint(tmp_path / "steps", "{step}", save_top_k=-1, every_n_train_steps=1)
    straight = fit(callbacks=[saving])
    expected = everything(straight)
    for step in range(1, straight.global_step):
        path = tmp_path / "steps" / f"step={step}.ckpt"
        assert read_checkpoint(path).header["followed"] == step - 1
        assert apart(expected["weights"], everything(fit(path))["weights"]) == 0, step


def test_going_back_takes_the_copy_along(tmp_path: Path) -> None:
    """A spike guard's snapshot holds the step of the last move: what is due after it is done again."""

    class Back(Callback):
        snapshot: Any = None

        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, index: int) -> None:
            if trainer.global_step == 4 and self.snapshot is None:
                self.snapshot = take(trainer)
            elif trainer.global_step == 6 and self.snapshot:
                restore(trainer, self.snapshot)
                assert pl_module.followed == 3
                self.snapshot = False

    run = trainer(tmp_path, max_steps=8, max_epochs=10, callbacks=[Back()])
    run.fit(made := module(every=4), datamodule=demonstration_data(tmp_path))
    body = made.networks["policy"]
    assert not torch.equal(body.slow_guess.weight, body.guess.weight)
    assert made.followed == 7


@pytest.mark.parametrize("whole", [False, True])
def test_it_starts_as_the_language_model_it_names(whole: bool, tmp_path: Path, stages: dict[str, Path]) -> None:
    """The part is that of the checkpoint, the rest is drawn, and a copy starts as what it is a copy of."""
    start = stages["language_model"]
    plain = load_network(start)
    assert isinstance(plain, PaLM)
    made = LitPolicy(GuessingConfig(plain.config, start=str(start), whole=whole), objective=Guess(), optimizer=sgd)
    data = demonstration_data(tmp_path)
    data.tokenizer = None  # it comes with the checkpoint
    seen: dict[str, Tensor] = {}

    class Watch(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            seen.update({k: v.clone() for k, v in pl_module.networks["policy"].state_dict().items()})

    trainer(tmp_path, max_epochs=1, callbacks=[Watch()]).fit(made, datamodule=data)
    assert all(torch.equal(seen[f"base.{name}"], value) for name, value in plain.state_dict().items())
    assert torch.equal(seen["slow_guess.weight"], seen["guess.weight"])
    assert 0.1 < seen["guess.weight"].std() < 0.6


def test_a_configuration_within_a_configuration_comes_back() -> None:
    inner = PaLMConfig(vocab_size=20, d_model=16, num_layers=1, num_heads=2, head_dim=8)
    data = config_to_dict(network(base=inner))
    assert data["init_args"]["base"]["class_path"] == "lit_palm.models.palm.PaLMConfig"
    assert config_from_dict(data, "here") == network(base=inner)
    data["init_args"]["base"]["class_path"] = "nowhere.Config"
    with pytest.raises(ValueError, match=r"^here: network 'nowhere.Config' is not installed"):
        config_from_dict(data, "here")
