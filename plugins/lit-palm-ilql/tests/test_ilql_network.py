"""The network: how it starts, decodes, follows its Q heads, and comes back from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ilql_walks import write
from lightning.pytorch import Trainer
from lit_palm_ilql import ILQL, ILQLConfig, ILQLNetwork
from torch import Tensor

from lit_palm import (
    CachedEngine,
    DemonstrationData,
    LitLanguageModel,
    LitPolicy,
    Network,
    PaLMConfig,
    PreferenceData,
    Sampling,
    load_network,
    read_checkpoint,
)
from lit_palm.callbacks import LastCheckpoint
from lit_palm.rollout.continuous_engine import ContinuousEngine


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_PALM_CACHE", str(tmp_path / "cache"))


def base(**changes: Any) -> PaLMConfig:
    return PaLMConfig(**{"d_model": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8, "max_length": 64, **changes})


def small(**changes: Any) -> ILQLNetwork:
    torch.manual_seed(0)
    made = ILQLConfig(base=base(vocab_size=30), **changes).build()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if not name.startswith("base."):
                weight.add_(0.3 * torch.randn_like(weight))
    return made


def trainer(folder: Path, **options: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "log_every_n_steps": 1,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "callbacks": [LastCheckpoint(str(folder))],
    }  # fmt: skip
    return Trainer(default_root_dir=str(folder), **{**quiet, **options})


def rated(folder: Path) -> PreferenceData:
    rows = [{"prompt": "ab", "completion": "cd" * (1 + i % 3), "rating": float(i % 2)} for i in range(8)]
    return PreferenceData(train=write(folder / "rated.jsonl", rows), batch_size=4, tokenizer="bytes")


# ------------------------------------------------------------------------------------------ decoding


def by_hand(made: ILQLNetwork, tokens: Tensor, beta: float) -> Tensor:
    """log pi + beta (min Q' - V) after each row's last token, by torch's own modules."""
    hidden = made.base(tokens, head=lambda hidden, weight, scale: hidden)[:, -1]

    def mlp(head: Any) -> Tensor:
        value: Tensor = head.out(torch.relu(head.up(hidden)))
        return value

    q = torch.stack([mlp(head) for head in made.target_q_heads]).amin(0)
    return torch.log_softmax(made.base(tokens)[:, -1], -1) + beta * (q - mlp(made.v_head))


@pytest.mark.parametrize("two_qs", [True, False])
@torch.no_grad()
def test_greedy_decoding_is_what_a_computation_by_hand_says(two_qs: bool) -> None:
    """Prompts of several lengths, so that rows are padded and end apart; ids are equal, log-probabilities to 1e-5."""
    made = small(two_qs=two_qs, decode_beta=3.0).eval()
    prompts = [torch.tensor(ids) for ids in ([3, 4, 5], [6], [7, 8], [3, 4, 5])]
    found = CachedEngine().generate(
        made, prompts, Sampling(max_new_tokens=8, temperature=0.0), torch.arange(4), pad_id=0, eos_id=1
    )
    for prompt, ids, logps in zip(prompts, found.completions, found.logps, strict=True):
        tokens = prompt[None]
        for token, logp in zip(ids.tolist(), logps.tolist(), strict=True):
            shifted = by_hand(made, tokens, 3.0)
            assert token == int(shifted.argmax())
            assert logp == pytest.approx(float(torch.log_softmax(shifted, -1)[0, token]), abs=1e-5)
            tokens = torch.cat([tokens, torch.tensor([[token]])], 1)
    others = ContinuousEngine(max_batch_size=2).generate(  # what serves and chats
        made, prompts, Sampling(max_new_tokens=8, temperature=0.0), torch.arange(4), pad_id=0, eos_id=1
    )
    assert [c.tolist() for c in others.completions] == [c.tolist() for c in found.completions]
    made.config.decode_beta = 0.0
    plain = CachedEngine().generate(
        made.base, prompts, Sampling(max_new_tokens=8, temperature=0.0), torch.arange(4), pad_id=0, eos_id=1
    )
    without = CachedEngine().generate(
        made, prompts, Sampling(max_new_tokens=8, temperature=0.0), torch.arange(4), pad_id=0, eos_id=1
    )
    assert [c.tolist() for c in without.completions] == [c.tolist() for c in plain.completions]
    assert [c.tolist() for c in found.completions] != [c.tolist() for c in plain.completions]


@torch.no_grad()
def test_a_cache_without_a_head_gives_shifted_logits_everywhere() -> None:
    made = small(decode_beta=2.0).eval()
    tokens = torch.tensor([[3, 4, 5, 6]])
    logits = made(tokens, cache=made.new_cache(1, 8))
    for t in range(4):
        torch.testing.assert_close(logits[:, t], by_hand(made, tokens[:, : t + 1], 2.0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(made(tokens), made.base(tokens))  # without a cache it is the language model


# ------------------------------------------------------------------------------------------ targets


def test_targets_start_as_copies_and_follow_when_it_is_time() -> None:
    torch.manual_seed(0)
    made = ILQLConfig(base=base(vocab_size=30), alpha=0.25, sync_steps=3).build()
    pairs = list(zip(made.target_q_heads.parameters(), made.q_heads.parameters(), strict=True))
    assert all(torch.equal(target, q) and not target.requires_grad for target, q in pairs)
    assert not torch.equal(made.q_heads[0].out.weight, made.q_heads[1].out.weight)
    with torch.no_grad():
        before = [target.clone() for target, _ in pairs]
        for _, q in pairs:
            q.add_(1.0)
        for step in range(1, 3):
            made.follow(step - 1, step)
        assert all(torch.equal(target, was) for (target, _), was in zip(pairs, before, strict=True))
        made.follow(2, 3)
        for (target, q), was in zip(pairs, before, strict=True):
            torch.testing.assert_close(target, 0.25 * q + 0.75 * was)
        made.follow(3, 9)  # two more moves
        for (target, q), was in zip(pairs, before, strict=True):
            torch.testing.assert_close(target, q + 0.75**3 * (was - q))


def test_targets_move_by_optimiser_steps_in_training(tmp_path: Path) -> None:
    """With alpha 1 the targets are the Q heads as they were at the last step that sync_steps divides."""
    torch.manual_seed(0)
    module = LitPolicy(ILQLConfig(base=base(), alpha=1.0, sync_steps=2), ILQL())
    seen: list[Tensor] = []

    class Watch(LastCheckpoint):
        def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **options: Any) -> None:
            super().on_train_batch_end(trainer, pl_module, *args, **options)
            seen.append(pl_module.networks["policy"].q_heads[0].out.weight.detach().clone())

    run = trainer(tmp_path, max_epochs=6, accumulate_grad_batches=2, callbacks=[Watch(str(tmp_path))])
    run.fit(module, datamodule=rated(tmp_path))
    assert run.global_step == 6
    made = load_network(tmp_path / "last.ckpt")
    assert isinstance(made, ILQLNetwork)
    # batches 8 and 9 of 12 are the fourth step's end and the fifth's beginning; the sixth step's move is still due
    assert torch.equal(made.target_q_heads[0].out.weight, seen[7])
    assert not torch.equal(made.q_heads[0].out.weight, seen[7])
    assert read_checkpoint(tmp_path / "last.ckpt").header["followed"] == 5


def test_flat_parts_are_refused() -> None:
    made = small()
    made.target_q_heads[0].out.weight = torch.nn.Parameter(torch.zeros(7), requires_grad=False)
    with pytest.raises(ValueError, match="use ModelParallelStrategy"):
        made.follow(0, 0)


# ------------------------------------------------------------------------------------------ where weights come from


def fine_tuned(folder: Path) -> Path:
    path = write(folder / "demos.jsonl", [{"prompt": "ab", "completion": "cd"}] * 4)
    torch.manual_seed(5)
    module = LitLanguageModel(base())
    data = DemonstrationData(train=path, tokenizer="bytes", batch_size=4)
    trainer(folder, max_epochs=1).fit(module, datamodule=data)
    return folder / "last.ckpt"


def test_it_starts_as_a_fine_tuned_language_model_and_needs_it_no_more(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    start = fine_tuned(tmp_path / "sft")
    config = ILQLConfig(start=str(start))
    assert config.base == load_network(start).config
    data = rated(tmp_path)
    data.tokenizer = None  # the checkpoint's
    torch.manual_seed(0)
    module = LitPolicy(config, ILQL(), reference=str(start), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    trainer(tmp_path, max_epochs=1).fit(module, datamodule=data)
    start.unlink()
    made, plain = load_network(tmp_path / "last.ckpt"), module.frozen["reference"]
    assert isinstance(made, ILQLNetwork) and isinstance(plain, Network)
    assert all(torch.equal(made.base.state_dict()[name], value) for name, value in plain.state_dict().items())
    assert made.config.vocab_size == 263
    heads = [made.q_heads[0].out.weight, made.v_head.up.weight]
    assert all(0.1 < w.std() * w.shape[1] ** 0.5 < 10 for w in heads), "heads are drawn, by fan-in"


def test_it_goes_around_a_hugging_face_model(tmp_path: Path) -> None:
    """A Llama folder: the language model says what transformers says, trains with its heads, decodes and comes back."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=270, max_position_embeddings=64)
    theirs = transformers.LlamaForCausalLM(llama).eval()
    theirs.save_pretrained(tmp_path / "llama")
    module = LitPolicy(ILQLConfig(start=str(tmp_path / "llama"), sync_steps=1, alpha=0.5), ILQL())
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=rated(tmp_path))
    frozen, trained = module.frozen["reference"], module.networks["policy"]
    assert isinstance(frozen, ILQLNetwork) and isinstance(trained, ILQLNetwork)
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(frozen(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)
        moved = (trained.target_q_heads[0].out.weight - frozen.q_heads[0].out.weight).abs().max()
        assert moved > 0 and (trained(tokens) - frozen(tokens)).abs().max() > 1e-3
        (tmp_path / "llama" / "model.safetensors").unlink()
        again = load_network(tmp_path / "last.ckpt", overrides={"decode_beta": 5.0})
        assert isinstance(again, ILQLNetwork)
        torch.testing.assert_close(again(tokens), trained(tokens))
        shifted = again(tokens, cache=again.new_cache(1, 8))[:, -1]
        torch.testing.assert_close(shifted, by_hand(again, tokens, 5.0), rtol=1e-4, atol=1e-5)


def test_the_objective_says_which_network_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ILQL reads q_1, .*, which PaLMConfig does not give"):
        trainer(tmp_path, max_epochs=1).fit(LitPolicy(base(), ILQL()), datamodule=rated(tmp_path))
    with pytest.raises(ValueError, match="set two_qs alike"):
        module = LitPolicy(ILQLConfig(base=base()), ILQL(two_qs=False))
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=rated(tmp_path))


@pytest.mark.parametrize(
    "options, reason",
    [
        ({}, "set start to a checkpoint, or base to a configuration"),
        ({"base": ILQLConfig(base=base())}, "name its checkpoint as model.network"),
        ({"base": base(), "alpha": 0.0}, "alpha must lie"),
        ({"base": base(), "sync_steps": 0}, "sync_steps must be at least 1"),
        ({"base": base(), "decode_beta": -1.0}, "decode_beta must be"),
        ({"start": "nowhere.ckpt"}, "does not exist"),
    ],
)
def test_a_configuration_that_makes_no_sense(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ILQLConfig(**options)


def test_any_other_objective_may_train_it_further(tmp_path: Path) -> None:
    """It is a language model too: fine-tuning moves the language model and leaves the heads alone."""
    path = write(tmp_path / "demos.jsonl", [{"prompt": "ab", "completion": "cd"}] * 4)
    torch.manual_seed(0)
    module = LitLanguageModel(ILQLConfig(base=base()))
    trainer(tmp_path, max_epochs=3).fit(module, DemonstrationData(train=path, tokenizer="bytes", batch_size=4))
    made = module.networks["policy"]
    assert isinstance(made, ILQLNetwork)
    assert torch.equal(made.q_heads[0].out.weight, made.target_q_heads[0].out.weight)
