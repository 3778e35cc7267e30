"""Every stage trains adapters on frozen weights, by YAML: what is in a checkpoint, and what each stage starts from."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_palm import load_network
from lit_palm.cli import main
from lit_palm.models.adapted import ScalarView, View
from lit_palm.models.logprobs import TokenLogProbs
from lit_palm.models.lora import LoRA
from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.rollout.rewards import RewardModel
from lit_palm.testing.processes import Program
from tests.lora.runs import LORA, base, configuration, data_of, fit, learned, tokens
from tests.support import policy, prompt_data, ranking_data, reward_model, same, trainer

# of float32 log-probabilities: a frozen matrix and its update are two sums, merged they are one
MERGED = 1e-5
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A language model of whole weights, and on it adapters of a language model, a reward model and a policy."""
    folder = tmp_path_factory.mktemp("lora")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_PALM_CACHE", str(folder / "cache"))
        start = base(folder)
        rewards = fit(folder / "reward", "LitRewardModel", network=str(start))
        scored = [{"class_path": "RewardModel", "init_args": {"checkpoint": str(rewards)}}]
        return {
            "base": start,
            "sft": fit(folder / "sft", "LitLanguageModel", network=str(start)),
            "reward": rewards,
            "ppo": fit(folder / "ppo", "LitPolicy", network=str(start), rewards=scored, steps=6),
        }


def small(checkpoint: Path) -> set[str]:
    return set(torch.load(checkpoint, weights_only=True)["state_dict"])


def test_checkpoints_hold_adapters_and_heads_and_name_their_base(stages: dict[str, Path]) -> None:
    roles = {"sft": ["policy"], "reward": ["reward"], "ppo": ["policy", "value"]}
    for name, own in roles.items():
        loaded = torch.load(stages[name], weights_only=True)
        keys, networks = set(loaded["state_dict"]), loaded["lit_palm"]["networks"]
        assert sorted(networks) == own
        for role in own:
            entry = networks[role]["lora"]
            assert entry["rank"] == 4 and entry["targets"] == ["attn_ffn_in", "attn_out", "ffn_out"]
            assert entry["base"]["path"] == str(stages["base"]) and len(entry["base"]["fingerprint"]) == 64
            assert sum(f".{role}.weight" in key for key in keys if "lora_" in key) == 6
        heads = {f"networks.shared.heads.{role}.{part}" for role in own if role != "policy"
                 for part in ("head.weight", "head.bias", "offset", "scale")}  # fmt: skip
        assert keys == heads | {key for key in keys if ".lora_" in key}
        assert len(loaded["lit_palm"]["optimizer"]["parameters"]) == 6 * len(own) + 2 * (own != ["policy"])


def run_of(stages: dict[str, Path], folder: Path, **options: Any) -> Any:
    """A policy with LoRA right after it was made, with what its first collection found."""
    module = policy(**{"network": str(stages["base"]), "lora": LoRA(**LORA), **options})
    run = trainer(folder, max_steps=1, limit_val_batches=0)
    run.fit(module, datamodule=prompt_data(folder, tokenizer=None))
    return module, run


def test_one_trunk_is_policy_value_reward_and_reference(stages: dict[str, Path], tmp_path: Path) -> None:
    module, run = run_of(stages, tmp_path, rewards=[RewardModel(str(stages["reward"]))])
    networks = [*module.networks.values(), *module.frozen.values()]
    kinds = [type(network) for network in networks]
    assert kinds == [View, ScalarView, View, ScalarView]  # policy, value, reference, reward
    plain = load_network(stages["base"])
    trunk = {name.replace(".base_layer", ""): p for name, p in module.networks.adapted.trunk.named_parameters()}
    for name, weight in plain.named_parameters():
        assert torch.equal(trunk[name], weight) and not trunk[name].requires_grad, "frozen"
    pointers = [{p.data_ptr() for p in network.parameters()} for network in networks]
    assert all({trunk[name].data_ptr() for name, _ in plain.named_parameters()} <= own for own in pointers)
    frozen = sum(p.numel() for p in plain.parameters())
    assert sum(p.numel() for p in module.parameters() if not p.requires_grad) == frozen + sum(
        p.numel() for n, p in module.named_parameters() if ".reward_0." in n
    ), "and nothing else of its size"
    assert float(run.callback_metrics["startup/max_logratio"]) < 1e-4


@torch.no_grad()
def test_the_reference_is_the_untouched_model(stages: dict[str, Path], tmp_path: Path) -> None:
    module, _ = run_of(stages, tmp_path)
    plain, ids = load_network(stages["base"]).eval(), tokens()
    expected = plain(ids, head=TokenLogProbs(ids, torch.ones_like(ids, dtype=torch.bool)))["logps"]
    found = module.frozen["reference"](ids, head=TokenLogProbs(ids, torch.ones_like(ids, dtype=torch.bool)))["logps"]
    assert torch.equal(found, expected), "to the last bit, after a step of the policy"
    trained = module.networks["policy"].eval()(ids)
    assert (trained - plain(ids)).abs().max() > 1e-4


@torch.no_grad()
def test_every_network_of_a_checkpoint_loads_with_whole_weights(stages: dict[str, Path]) -> None:
    plain = load_network(stages["base"]).get_submodule("layers.0.attn_out").weight
    for name, roles in (("sft", ("policy",)), ("reward", ("reward", "value")), ("ppo", ("policy", "value"))):
        stored = torch.load(stages[name], weights_only=True)["state_dict"]
        for role in roles:
            network = load_network(stages[name], role)
            assert not [n for n, _ in network.named_parameters() if "lora" in n]
            layer = network.get_submodule(f"{'' if role == 'policy' else 'trunk.'}layers.0.attn_out")
            own = "reward" if name == "reward" else role
            a, b = (stored[f"networks.shared.trunk.layers.0.attn_out.lora_{x}.{own}.weight"] for x in "AB")
            whole = plain + LORA["alpha"] / LORA["rank"] * b @ a
            assert (layer.weight - whole).abs().max() < 1e-6 and b.abs().max() > 0  # type: ignore[operator]


@torch.no_grad()
def test_the_next_stage_starts_as_the_last_one_ended(stages: dict[str, Path], tmp_path: Path) -> None:
    """Merged without `lora`, as an adapter that goes on with it; the frozen reference is a copy of that adapter."""
    ids, start = tokens(), load_network(stages["sft"]).eval()
    assert (start(ids) - load_network(stages["base"]).eval()(ids)).abs().max() > 1e-4

    def made(**options: Any) -> Any:
        module = policy(**{"network": str(stages["sft"]), **options})
        run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
        seen: dict[str, Any] = {}

        original = module.on_train_start

        def look() -> None:
            original()
            modes = module.training
            module.eval()
            seen.update({k: n(ids) for k, n in [*module.networks.items(), *module.frozen.items()]})
            module.train(modes)

        module.on_train_start = look  # type: ignore[method-assign]
        run.fit(module, datamodule=prompt_data(tmp_path, tokenizer=None))
        return module, seen

    whole, seen = made()
    assert (seen["policy"] - start(ids)).abs().max() < MERGED and all(
        p.requires_grad for p in whole.networks.parameters()
    )
    module, seen = made(lora=LoRA(**LORA), rewards=[RewardModel(str(stages["reward"]))])
    assert (seen["policy"] - start(ids)).abs().max() < MERGED
    assert torch.equal(seen["policy"], seen["reference"]), "the reference has a frozen copy of the adapter"
    rewards = load_network(stages["reward"], "reward").eval()
    assert (seen["reward/reward_model"] - rewards(ids)).abs().max() < MERGED
    assert (seen["value"] - rewards(ids)).abs().max() < MERGED, "the value starts as the reward model, head and all"
    assert isinstance(module.frozen["reward/reward_model"], ScalarView)
    after = module.frozen["reference"](ids)
    assert torch.equal(after, seen["reference"]) and (module.networks["policy"](ids) - after).abs().max() > 1e-5


def test_sampling_from_merged_matrices_changes_no_completion(stages: dict[str, Path], tmp_path: Path) -> None:
    """From an adapter that matters: the same tokens, and log-probabilities that those of training agree with."""
    found = []
    for merged in (False, True):
        module, run = run_of(stages, tmp_path, network=str(stages["sft"]), lora=LoRA(**LORA, merge_to_sample=merged))
        found.append(module.samples)
        assert 0 < float(run.callback_metrics["startup/engine_logratio"]) < 1e-5
    assert found[0] == found[1] and len(found[0]) == 8


@torch.no_grad()
def test_a_reward_model_on_other_weights_stands_beside_the_trunk(stages: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = reward_model()
    run = trainer(tmp_path, max_steps=2, limit_val_batches=0)
    run.fit(module, datamodule=ranking_data(tmp_path))
    run.save_checkpoint(tmp_path / "other.ckpt")
    made, _ = run_of(stages, tmp_path, rewards=[RewardModel(str(tmp_path / "other.ckpt"))])
    network = made.frozen["reward/reward_model"]
    assert not isinstance(network, ScalarView)
    assert torch.equal(network(tokens()), load_network(tmp_path / "other.ckpt", "reward").eval()(tokens()))
    with pytest.raises(ValueError, match=r"model\.value: .*other.ckpt brings weights of its own"):
        run_of(stages, tmp_path, value=str(tmp_path / "other.ckpt"))


def test_resuming_in_the_middle_of_a_collection_is_exact(stages: dict[str, Path], tmp_path: Path) -> None:
    scored = [{"class_path": "RewardModel", "init_args": {"checkpoint": str(stages["reward"])}}]
    options: dict[str, Any] = {"network": str(stages["base"]), "rewards": scored, "steps": 7, "clip_per_network": True,
                               "lora": {**LORA, "dropout": 0.1, "dora": True}}  # fmt: skip
    whole = fit(tmp_path / "whole", "LitPolicy", **options)
    middle = tmp_path / "whole" / "step-00000003.ckpt"  # of four in a collection
    again = fit(tmp_path / "again", "LitPolicy", f"--ckpt_path={middle}", **options)
    same(learned(whole), learned(again))
    assert learned(whole)["step"] == 7 and any("magnitude" in key for key in learned(whole)["weights"])


def test_reward_and_language_models_resume_exactly(stages: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("LitLanguageModel", "LitRewardModel"):
        whole = fit(tmp_path / kind, kind, network=str(stages["base"]), steps=5)
        middle = tmp_path / kind / "step-00000002.ckpt"
        again = fit(tmp_path / f"{kind}2", kind, f"--ckpt_path={middle}", network=str(stages["base"]), steps=5)
        same(learned(whole), learned(again))


def test_a_network_that_starts_from_nothing_is_drawn_again(tmp_path: Path) -> None:
    """No checkpoint holds its frozen weights: a checkpoint says the seed they are drawn from."""
    network = {"class_path": "PaLMConfig", "init_args": {"d_model": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8}}
    data = data_of(tmp_path / "data")["LitPolicy"]
    data["init_args"]["tokenizer"] = "bytes"
    whole = fit(tmp_path / "whole", "LitPolicy", network=network, data=data, steps=4)
    again = fit(tmp_path / "again", "LitPolicy", f"--ckpt_path={tmp_path / 'whole' / 'step-00000002.ckpt'}",
                network=network, data=data, steps=4)  # fmt: skip
    same(learned(whole), learned(again))
    one, other = load_network(whole), load_network(again)
    same(one.state_dict(), other.state_dict())


# ------------------------------------------------------------------------------------------ one clear error each


def test_a_base_that_moved_or_changed_is_named(
    stages: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "start.ckpt"
    shutil.copy(stages["base"], place)
    adapter = fit(tmp_path / "sft", "LitLanguageModel", network=str(place))
    expected = load_network(adapter)(tokens())
    place.rename(tmp_path / "elsewhere.ckpt")
    with pytest.raises(ValueError, match=r"start.ckpt, which does not exist: put that back.*LIT_PALM_BASE"):
        load_network(adapter)
    monkeypatch.setenv("LIT_PALM_BASE", str(tmp_path / "elsewhere.ckpt"))
    assert torch.equal(load_network(adapter)(tokens()), expected)
    monkeypatch.delenv("LIT_PALM_BASE")
    loaded = torch.load(tmp_path / "elsewhere.ckpt", weights_only=True)
    loaded["state_dict"]["networks.policy.layers.0.attn_out.weight"][0, 0] += 1e-3
    torch.save(loaded, place)
    with pytest.raises(ValueError, match=r"start.ckpt, which have changed since it was trained"):
        load_network(adapter)


def test_a_resumed_run_has_the_same_base_and_the_same_adapter(
    stages: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = fit(tmp_path / "one", "LitLanguageModel", network=str(stages["base"]), steps=1)
    other, loaded = tmp_path / "other.ckpt", torch.load(stages["base"], weights_only=True)
    loaded["state_dict"]["networks.policy.layers.0.attn_out.weight"] *= 2
    torch.save(loaded, other)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("on other frozen weights than this run", {"network": str(other)}),
        ("has lora.rank 4 in its policy, the configuration 8", {"lora": {"rank": 8, "alpha": 8.0}}),
        ("has lora.rslora False", {"lora": {**LORA, "rslora": True}}),
        ("trained a LoRA adapter as policy: resume it with model.lora", {"lora": None}),
    ]
    for reason, options in wrong:
        fields = {"network": str(stages["base"]), **options}
        path = configuration(tmp_path / "again", "LitLanguageModel", 2, **fields)
        assert main(["fit", "--config", str(path), f"--ckpt_path={adapter}"]) != 0
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, model, reason",
    [
        (
            "LitLanguageModel",
            {"lora": {"targets": ["q_proj"]}},
            "no linear layer is called q_proj in the blocks of a PaLM",
        ),
        ("LitLanguageModel", {"lora": {"rank": 0}}, "lora.rank is 0"),
        ("LitLanguageModel", {"network": "sft", "lora": {"rank": 2}}, "its adapter has rank: 4, alpha: 8.0"),
        ("LitPolicy", {"reference_update": {"mix": 0.5}}, "model.reference_update mixes the policy's weights"),
    ],
)
def test_wrong_settings_are_one_line(
    kind: str,
    model: dict[str, Any],
    reason: str,
    stages: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields = {"network": "base", **model}
    fields["network"] = str(stages[fields["network"]])
    assert main(["fit", "--config", str(configuration(tmp_path / "run", kind, 1, **fields))]) != 0
    err = capsys.readouterr().err
    assert reason in err and "Traceback" not in err


def test_a_plan_says_that_it_does_not_know(
    stages: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = configuration(tmp_path / "run", "LitLanguageModel", 1, network=str(stages["base"]))
    assert main(["plan", "--config", str(path), "--device=a100-80gb"]) != 0
    assert "model.lora: the formulas of a plan" in capsys.readouterr().err


def test_missing_packages_are_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import util

    real = util.find_spec
    for name, lora, way in (("peft", LoRA(), r"pip install 'lit-palm\[lora\]'"),
                            ("bitsandbytes", LoRA(quantize="4bit"), "pip install bitsandbytes")):  # fmt: skip
        monkeypatch.setattr(util, "find_spec", lambda n, *a, name=name: None if n == name else real(n, *a))
        with pytest.raises(ValueError, match=way):
            policy(network="does-not-exist.ckpt", lora=lora)


# ------------------------------------------------------------------------------------------ other objectives


def test_offline_objectives_need_no_change(stages: dict[str, Path], tmp_path: Path) -> None:
    """DPO's log-ratio is zero before the first step, since the reference is the trunk as it is."""
    pytest.importorskip("lit_palm_dpo")
    pairs = data_of(tmp_path / "data")["pairs"]
    for precomputed in (False, True):
        folder = tmp_path / f"dpo{precomputed}"
        fit(folder, "LitPolicy", network=str(stages["sft"]), data=pairs, steps=4, precompute_reference=precomputed,
            objective={"class_path": "DPO"})  # fmt: skip
    one, other = (learned(tmp_path / f"dpo{p}" / "last.ckpt") for p in (False, True))
    same(one, other)
    assert read_checkpoint(tmp_path / "dpoTrue" / "last.ckpt").header["networks"]["policy"]["lora"]["rank"] == 4


def test_objectives_that_sample_groups_need_no_change(stages: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("lit_palm_grpo")
    sizes = {"num_prompts": 4, "completions_per_prompt": 2, "passes": 1, "minibatch_size": 4}
    rewards = [{"class_path": "PythonReward", "init_args": {"function": "tests.support.lower_case"}}]
    path = fit(tmp_path / "grpo", "LitPolicy", network=str(stages["base"]), steps=3, objective={"class_path": "GRPO"},
               rollout=sizes, rewards=rewards, sampling={"max_new_tokens": 6})  # fmt: skip
    assert small(path) == {key for key in small(path) if ".policy." in key} != set()


def test_completions_of_a_checkpoint(stages: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """`generate` knows nothing of adapters: it gets whole weights."""
    assert (
        main(["generate", f"--checkpoint={stages['ppo']}", "--prompt=the cat", "--max_new_tokens=5", "--temperature=0"])
        == 0
    )
    assert capsys.readouterr().out.startswith("the cat")


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(stages: dict[str, Path], tmp_path: Path) -> None:
    """SIGKILL in the middle of the second collection; whatever was saved last is what it goes on from."""
    options: dict[str, Any] = {"network": str(stages["sft"]), "steps": 12}
    whole = fit(tmp_path / "whole", "LitPolicy", **options)
    path = configuration(tmp_path / "killed", "LitPolicy", options["steps"], network=options["network"])
    process = Program("lit_palm", ["fit", "--config", str(path)], tmp_path / "log", folder=ROOT)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "killed" / "step-00000006.ckpt").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
    last = tmp_path / "killed" / "last.ckpt"
    assert 5 <= learned(last)["step"] < options["steps"]
    again = fit(tmp_path / "killed", "LitPolicy", f"--ckpt_path={last}", **options)
    same(learned(whole), learned(again))
