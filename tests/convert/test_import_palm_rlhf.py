"""Checkpoints of palm-rlhf-pytorch against the package itself: PaLM, both gamma conventions, LoRA scopes, rewards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from palm_rlhf_pytorch import PaLM as TheirPaLM
from palm_rlhf_pytorch import RewardModel as TheirRewardModel
from palm_rlhf_pytorch.ppo import ActorCritic
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_palm.cli import main
from lit_palm.models.base import Network, ScalarNetwork
from lit_palm.models.palm import PaLM
from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.modules.weights import load_network

# both compute in float32; sums of a few hundred terms in another order
TOLERANCE = 1e-5


def theirs(seed: int = 0, **changes: Any) -> TheirPaLM:
    """A PaLM of theirs whose weights, norms too, are not what they start with."""
    torch.manual_seed(seed)
    sizes = {"num_tokens": 270, "dim": 32, "depth": 2, "dim_head": 16, "heads": 3}
    network = TheirPaLM(**{**sizes, **changes}).eval()
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("gamma"):
                weight.copy_(torch.randn_like(weight) * 0.2)
            elif "finetune" in name or name.endswith("_scale"):
                weight.copy_(torch.randn_like(weight) * 0.3 + 0.5 * name.endswith("_scale"))
    return network


def tokens(rows: int = 3, width: int = 20) -> Tensor:
    return torch.randint(0, 260, (rows, width), generator=torch.Generator().manual_seed(7))


def run(folder: Path, state: dict[str, Tensor], *flags: str, name: str = "palm.pt") -> Path:
    """Save a state dict, import it, and give back the folder."""
    (save_file if name.endswith(".safetensors") else torch.save)(state, folder / name)
    target = folder / "imported"
    assert main(["import", str(folder / name), str(target), "--tokenizer", "bytes", *flags]) == 0
    return target


def refused(capsys: pytest.CaptureFixture[str], folder: Path, state: Any, *flags: str) -> str:
    """The one line that an import ends with; nothing is written."""
    torch.save(state, folder / "palm.pt")
    assert main(["import", str(folder / "palm.pt"), str(folder / "imported"), "--tokenizer", "bytes", *flags]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lit-palm: error: "), lines
    assert {path.name for path in folder.iterdir()} <= {"palm.pt"}
    return lines[0]


def policy(folder: Path) -> Network:
    network = load_network(folder)
    assert isinstance(network, Network)
    return network.eval()


@pytest.mark.parametrize("changes", [{}, {"qk_rmsnorm": True}, {"ff_mult": 2, "rotary_xpos_scale_base": 64}])
@torch.no_grad()
def test_logits_are_theirs(tmp_path: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    network = theirs(**changes)
    flags = [f"--xpos_scale_base={changes['rotary_xpos_scale_base']}"] if "rotary_xpos_scale_base" in changes else []
    imported = policy(run(tmp_path, network.state_dict(), *flags))
    assert (imported(tokens()) - network(tokens())).abs().max() < TOLERANCE
    assert "gamma + 1" in capsys.readouterr().err
    again = [w for k, w in imported.named_parameters() if k.endswith("attn_out.weight")]
    assert torch.equal(again[1], network.state_dict()["layers.1.fn.attn_out.weight"])


@torch.no_grad()
def test_old_gammas_give_the_same_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = theirs()
    state = {k: v + 1 if k.endswith("gamma") else v for k, v in network.state_dict().items()}
    # what wrote such a file multiplied by gamma itself; loading it into the new code succeeds and is wrong
    wrong = theirs()
    wrong.load_state_dict(state)
    assert (wrong(tokens()) - network(tokens())).abs().max() > 0.1
    imported = policy(run(tmp_path, state))
    assert (imported(tokens()) - network(tokens())).abs().max() < TOLERANCE
    assert "norm weights are gamma:" in capsys.readouterr().err
    again = policy(run(tmp_path, state, "--gamma", "plain"))
    assert torch.equal(again(tokens()), imported(tokens()))


@pytest.mark.parametrize("told, plus", [("plain", 0.0), ("plus_one", 1.0)])
def test_a_contradicted_convention_is_refused(
    tmp_path: Path, told: str, plus: float, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"plain": "plus_one", "plus_one": "plain"}[told]
    state = {k: v + (told == "plus_one") if k.endswith("gamma") else v for k, v in theirs().state_dict().items()}
    message = refused(capsys, tmp_path, state, "--gamma", told)
    assert f"--gamma {told} contradicts the file" in message and f"--gamma {other}" in message
    imported = policy(run(tmp_path, state, "--gamma", told, "--trust_gamma", "true"))
    assert "WARNING" in capsys.readouterr().err
    assert torch.equal(dict(imported.named_parameters())["norm.weight"], state["norm.gamma"] + plus)


@pytest.mark.parametrize("middle", [0.5, 0.3, 0.15])
def test_gammas_that_may_be_either_are_refused(
    tmp_path: Path, middle: float, capsys: pytest.CaptureFixture[str]
) -> None:
    # weights of 0.3 in the old convention, of 1.3 in the new one: either happens
    state = {k: v * 0.1 + middle if k.endswith("gamma") else v for k, v in theirs().state_dict().items()}
    message = refused(capsys, tmp_path, state)
    assert "cannot tell whether a norm's weight is gamma or gamma + 1" in message and "--gamma plus_one" in message
    run(tmp_path, state, "--gamma", "plus_one")


@pytest.mark.parametrize("weight", [0.1, 0.4, 0.8, 1.0])
def test_trained_gammas_of_the_new_convention_are_told(
    tmp_path: Path, weight: float, capsys: pytest.CaptureFixture[str]
) -> None:
    # norm weights of language models shrink rather than grow, and stay positive
    state = {k: v * 0.2 * weight + weight - 1 if k.endswith("gamma") else v for k, v in theirs().state_dict().items()}
    run(tmp_path, state)
    assert "norm weights are gamma + 1" in capsys.readouterr().err


@torch.no_grad()
def test_merging_is_rounded_once(tmp_path: Path) -> None:
    network = theirs(finetune_scopes=("one",), lora_r=2)
    state = {k: v.bfloat16() for k, v in network.state_dict().items()}
    folder = run(tmp_path, state, "--scope", "one")
    factors = [state[f"finetune_modules.one.0.2.{part}"].double() for part in "AB"]
    fused = state["layers.0.fn.fused_attn_ff_proj.weight"].double()
    expected = (fused[64:80] + (factors[0] @ factors[1]).t()).bfloat16()  # the value's rows
    found = load_file(folder / "policy.safetensors")["layers.0.attn_ffn_in.weight"][64:80]
    assert (found != expected).double().mean() < 0.01  # where float32 and float64 round apart


@torch.no_grad()
def test_a_scope_is_merged_kept_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = theirs(finetune_scopes=("one", "two"), lora_r=2)
    state = network.state_dict()
    message = refused(capsys, tmp_path, state)
    assert "has the LoRA scopes one, two: say --scope NAME" in message
    assert "no LoRA scope 'three'; it has one, two" in refused(capsys, tmp_path, state, "--scope", "three")
    for scope in ("one", "two"):
        imported = policy(run(tmp_path, state, "--scope", scope))
        assert (imported(tokens()) - network(tokens(), finetune_scope=scope)).abs().max() < TOLERANCE
    imported = policy(run(tmp_path, state, "--scope", "none"))
    assert (imported(tokens()) - network(tokens())).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_kept_scope_is_an_adapter_of_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    network = theirs(finetune_scopes=("actor",), lora_r=2)
    folder = run(tmp_path, network.state_dict(), "--scope", "actor", "--keep_lora", "true")
    imported = policy(folder)
    assert (imported(tokens()) - network(tokens())).abs().max() < TOLERANCE
    described = json.loads((folder / "adapter-actor" / "adapter_config.json").read_text())
    adapted = inject_adapter_in_model(LoraConfig(**described), imported)
    found = set_peft_model_state_dict(adapted, load_file(folder / "adapter-actor" / "adapter_model.safetensors"))
    assert not found.unexpected_keys
    expected = network(tokens(), finetune_scope="actor")
    assert (adapted(tokens()) - expected).abs().max() < TOLERANCE
    assert (policy(folder / "adapter-actor")(tokens()) - expected).abs().max() < TOLERANCE  # and a checkpoint of ours


@pytest.mark.parametrize("lora", [True, False])
@torch.no_grad()
def test_rewards_are_theirs(tmp_path: Path, lora: bool, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    model = TheirRewardModel(theirs(), use_lora=lora, lora_r=2).eval()
    for name, weight in model.named_parameters():
        if "finetune" in name:
            weight.normal_(0, 0.3)
    mask = torch.arange(20)[None] < torch.tensor([20, 11, 5])[:, None]
    folder = run(tmp_path, model.state_dict())
    imported = load_network(folder, "reward")
    assert isinstance(imported, ScalarNetwork)
    scores = imported.eval()(tokens(), mask=mask)
    expected = model(tokens(), mask=mask)
    assert (scores.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1) - expected).abs().max() < TOLERANCE
    assert ("LoRA scope reward belongs to the reward model" in capsys.readouterr().err) is lora
    # the same embedding for prompt and response becomes a part of every token's
    model.prompt_embed.normal_(0, 0.5)
    model.response_embed.copy_(model.prompt_embed)
    both = load_network(run(tmp_path, model.state_dict()), "reward").eval()(tokens(), mask=mask)
    expected = model(tokens(), mask=mask, prompt_mask=mask)
    assert (both.gather(1, mask.sum(1, keepdim=True) - 1).squeeze(1) - expected).abs().max() < TOLERANCE


@torch.no_grad()
def test_rewards_that_have_no_counterpart_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = TheirRewardModel(theirs(), use_lora=False).eval()
    model.prompt_embed.normal_()
    message = refused(capsys, tmp_path, model.state_dict())
    assert "prompt_embed and response_embed differ" in message and "--segments ignore" in message
    imported = load_network(run(tmp_path, model.state_dict(), "--segments", "ignore"), "reward").eval()
    assert "WARNING: left out prompt_embed" in capsys.readouterr().err
    assert (imported(tokens())[:, -1] - model(tokens())).abs().max() < TOLERANCE


def test_a_reward_model_with_bins_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = TheirRewardModel(theirs(), num_binned_output=5, use_lora=False).state_dict()
    assert "a head of 5 bins (num_binned_output)" in refused(capsys, tmp_path, state)


@torch.no_grad()
def test_the_actor_of_its_trainers_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ActorCritic(theirs(), critic_dim_out=4).eval()
    for name, weight in both.actor_palm.named_parameters():
        if "finetune" in name:
            weight.normal_(0, 0.3)
    state = {f"_orig_mod.{name}": weight for name, weight in both.state_dict().items()}
    imported = policy(run(tmp_path, {"model": state, "step": 5}, "--scope", "actor"))
    assert "left out critic, value_head" in capsys.readouterr().err
    assert (imported(tokens()) - both(tokens(), return_values=False)[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "size, shape", [("150m", (768, 12)), ("410m", (1024, 24)), ("1b", (2048, 16)), ("2b", (2560, 24))]
)
def test_the_four_sizes_are_known_by_shape(size: str, shape: tuple[int, int]) -> None:
    from lit_palm.foreign.palm_rlhf import CONCEPTOFMIND, _conceptofmind
    from lit_palm.models.palm import PaLMConfig

    config = PaLMConfig(
        vocab_size=50304, d_model=shape[0], num_layers=shape[1], num_heads=8, head_dim=128, d_ffn=4 * shape[0]
    )
    assert _conceptofmind(config) == f"conceptofmind-{size}" and CONCEPTOFMIND[f"conceptofmind-{size}"] == shape


@torch.no_grad()
def test_a_size_of_conceptofmind(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    import huggingface_hub.constants

    from lit_palm.foreign import palm_rlhf

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # the smallest has 120 million numbers: the same path with a narrower one under its name
    monkeypatch.setitem(palm_rlhf.CONCEPTOFMIND, "conceptofmind-150m", (32, 2))
    monkeypatch.setattr(palm_rlhf, "CONCEPTOFMIND_VOCABULARY", 270)
    network = theirs(dim_head=128, heads=8)
    state = {k: v + 1 if k.endswith("gamma") else v for k, v in network.state_dict().items()}
    folder = run(tmp_path, state, "--preset", "conceptofmind-150m")
    assert "has the shape of conceptofmind-150m" in capsys.readouterr().err
    imported = policy(folder)
    assert isinstance(imported, PaLM) and imported.config.max_length == 8192
    assert (imported(tokens()) - network(tokens())).abs().max() < TOLERANCE
    assert main(["import", str(tmp_path / "palm.pt"), str(tmp_path / "other")]) == 2  # no hub here
    assert "was trained with the tokeniser EleutherAI/gpt-neox-20b" in capsys.readouterr().err
    message = refused(capsys, _fresh(tmp_path), theirs().state_dict(), "--preset", "conceptofmind-150m")
    assert "is not conceptofmind-150m, which is 32 wide with 2 blocks" in message


def _fresh(folder: Path) -> Path:
    (folder / "fresh").mkdir()
    return folder / "fresh"


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = theirs().state_dict()
    broken = {
        "to_logits.weight differs": {**state, "to_logits.weight": state["to_logits.weight"] + 1},
        "layers.1.fn.norm.beta is not zero": {**state, "layers.1.fn.norm.beta": torch.ones(32)},
        "has layers.0.fn.moe.weight, which": {**state, "layers.0.fn.moe.weight": torch.ones(3)},
        "lacks layers.1.fn.attn_out.weight": {k: v for k, v in state.items() if k != "layers.1.fn.attn_out.weight"},
        "layers.1.fn.attn_out.weight has shape (32, 47), (32, 48) was": {
            **state, "layers.1.fn.attn_out.weight": torch.ones(32, 47),
        },
        "quantised weights cannot be trained": {**state, "norm.gamma": torch.zeros(32, dtype=torch.int8)},
        "rotary_emb.inv_freq are not RoPE's": {**state, "layers.0.fn.rotary_emb.inv_freq": torch.arange(8.0) + 1},
        "which are no weights of palm-rlhf-pytorch": {"x": torch.ones(2)},
        "without tensors": {"step": 3},
    }  # fmt: skip
    for reason, bad in broken.items():
        assert reason in refused(capsys, tmp_path, bad)
    assert "has 270 token ids" in refused(capsys, tmp_path, state, "--tokenizer", _wide(tmp_path.parent))


def _wide(folder: Path) -> str:
    """A tokeniser of more ids than the network has."""
    from lit_palm.data.tokenizers import BPETokenizer

    tokenizer = BPETokenizer(300)
    tokenizer.train(["the quick brown fox jumps over the lazy dog, pack my box with five dozen liquor jugs"] * 3)
    tokenizer.save(str(folder / "wide"))
    return str(folder / "wide")


def test_no_code_is_run_and_a_short_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("run",))

    assert "cannot be read safely" in refused(capsys, tmp_path, {"x": Evil()})
    torch.save(theirs().state_dict(), tmp_path / "palm.pt")
    (tmp_path / "palm.pt").write_bytes((tmp_path / "palm.pt").read_bytes()[:-2000])
    assert main(["import", str(tmp_path / "palm.pt"), str(tmp_path / "imported"), "--tokenizer", "bytes"]) == 2
    assert "palm.pt: is truncated: copy or download it again" in capsys.readouterr().err


@torch.no_grad()
def test_either_name_of_the_tied_weight_will_do(tmp_path: Path) -> None:
    network = theirs()
    for dropped in ("token_emb.weight", "to_logits.weight"):
        state = {k: v for k, v in network.state_dict().items() if k != dropped}
        imported = policy(run(tmp_path, state, name="palm.safetensors"))
        assert (imported(tokens()) - network(tokens())).abs().max() < TOLERANCE


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert "*.pt" in allow_patterns and "*.py" not in allow_patterns
        return str(tmp_path / "cached")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "cached").mkdir()
    torch.save(theirs().state_dict(), tmp_path / "cached" / "palm_v0.pt")
    arguments = ["import", "somebody/palm-tiny", str(tmp_path / "imported"), "--tokenizer", "bytes"]
    assert main(arguments) == 0 and asked == ["somebody/palm-tiny"]
    torch.save({}, tmp_path / "cached" / "palm_v1.pt")
    assert main(arguments) == 2
    assert "holds palm_v0.pt, palm_v1.pt: name one of them" in capsys.readouterr().err


def test_safetensors_and_types_are_kept(tmp_path: Path) -> None:
    state = {k: v.bfloat16() for k, v in theirs().state_dict().items() if k != "to_logits.weight"}
    folder = run(tmp_path, state, "--max_length", "64", name="palm.safetensors")
    stored = load_file(folder / "policy.safetensors")
    assert {w.dtype for w in stored.values()} == {torch.bfloat16}
    checkpoint = read_checkpoint(folder, header_only=True)
    assert checkpoint.header["networks"]["policy"]["init_args"]["max_length"] == 64
    assert checkpoint.tokenizer is not None and checkpoint.tokenizer.vocab_size == 263


def test_a_foreign_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = theirs().state_dict()
    run(tmp_path, state)
    run(tmp_path, state)  # its own
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    arguments = ["import", str(tmp_path / "palm.pt"), str(tmp_path / "full"), "--tokenizer", "bytes"]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "is not empty (it holds thesis.tex)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_folder_behind_a_url(tmp_path: Path) -> None:
    import fsspec

    torch.save(theirs(finetune_scopes=("one", "two"), lora_r=2).state_dict(), tmp_path / "palm.pt")
    arguments = ["import", str(tmp_path / "palm.pt"), "memory://imports/palm", "--tokenizer", "bytes"]
    for scope in ("one", "two", "two"):
        assert main([*arguments, "--scope", scope, "--keep_lora", "true"]) == 0
    files = fsspec.filesystem("memory").find("/imports/palm")
    kept = ("adapter_config.json", "adapter_model.safetensors", "config.json", "policy.safetensors")
    names = ["config.json", "policy.safetensors", *(f"adapter-two/{name}" for name in kept)]
    assert files == sorted(f"/imports/palm/{name}" for name in names)
    assert read_checkpoint("memory://imports/palm").header["kind"] == "language_model"
