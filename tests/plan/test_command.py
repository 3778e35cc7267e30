"""`lit-palm plan` as a person types it: YAML and flags of fit, a table or JSON, one clear error for bad input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docstring_parser
import pytest

from lit_palm.cli import main
from lit_palm.data.tokenizers import ByteTokenizer
from tests import support
from tests.test_configs import docstrings

ROOT = Path(__file__).parents[2]
SHARDED = ["--trainer.strategy=ModelParallelStrategy", "--trainer.precision=bf16-mixed"]
PPO = ["--config=configs/ppo.yaml", "--network=8b", "--prompt_length=512", "--model.rollout.num_prompts=256",
       "--model.rollout.minibatch_size=128", *SHARDED]  # fmt: skip
LM = ["--config=configs/pretrain.yaml", "--config=configs/palm/8b.yaml", "--vocab_size=256000", *SHARDED]
SMALL = ["--config=configs/pretrain.yaml", "--config=configs/palm/30m.yaml"]
MANY = ["--device=a100-80gb", "--devices=64"]


@pytest.fixture(autouse=True)
def beside_the_configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Where nothing has been trained, whatever lies in the checkout's runs/."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(docstring_parser, "parse_from_object", docstrings)
    argv = list(sys.argv)
    yield
    sys.argv[:] = argv


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["plan", *argv, "--json"]) == 0
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


def error(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    try:
        status: Any = main(["plan", *argv])
    except SystemExit as stop:  # fit's own parser
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and not out and err.startswith("lit-palm: error: ") and len(err.splitlines()) == 1
    return err


def test_json_of_ppo(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, *PPO, *MANY)
    assert set(found) == {
        "objective", "device", "strategy", "precision", "batch", "parameters", "trained_parameters", "memory", "peak",
        "fits", "changes", "communication", "utilisation", "flops_per_token", "executed_flops_per_token", "tokens",
        "total_flops", "tokens_per_second", "model_flops_utilisation", "days", "device_hours", "cost", "notes",
    }  # fmt: skip
    assert set(found["parameters"]) == {"policy", "value", "reference", "reward/reward_model", "total"}
    assert found["parameters"]["policy"] == pytest.approx(8.63e9, rel=0.01)
    assert set(found["memory"]) == {"update", "rollout", "annotate"}
    for part in found["memory"].values():
        assert part["peak"] == pytest.approx(sum(part["by_kind"].values()), rel=1e-6)
    # a slot of a row: keys and values of 32 layers, one head of 256, two bytes each
    assert found["memory"]["rollout"]["largest"]["KV cache"] == pytest.approx(4 * 640 * 32 * 256 * 2 * 2, rel=0.6)
    assert found["peak"] == max(part["peak"] for part in found["memory"].values())
    assert found["fits"] and 20 * 2**30 < found["peak"] < 40 * 2**30, "one of four networks is whole"
    assert found["cost"] == pytest.approx(found["device_hours"] * 1.8)
    assert found["device_hours"] == pytest.approx(found["days"] * 24 * 64)
    assert found["tokens"] == 200 * 256 * 640  # epochs, completions, tokens
    assert any("runs/reward/last.ckpt" in note for note in found["notes"])


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *LM, *MANY, "--tokens=300e9"]) == 0
    out = capsys.readouterr().out
    for text in (
        "Parameters",
        "8,632,012,800",
        "activations",
        "peak",
        "It fits",
        "tokens a second",
        "cost, USD",
        "3e+11",
    ):
        assert text in out
    assert max(len(line) for line in out.splitlines()) <= 120


def test_what_is_advised_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    lm = ["--config=configs/pretrain.yaml", "--network=8b", "--device=a100-40gb", "--devices=8", "--length=1024"]
    found = plan(capsys, *lm)
    assert not found["fits"] and found["strategy"]["kind"] == "ddp"
    alone = {c["change"]: c for c in found["changes"] if not c["together"]}
    assert all(c["peak"] < found["peak"] for c in alone.values())
    sharded = next(c for text, c in alone.items() if text.startswith("shard over the 8 devices"))
    assert plan(capsys, *lm, "--trainer.strategy=ModelParallelStrategy")["peak"] == sharded["peak"]
    low = next(c for text, c in alone.items() if "bf16-true" in text)
    assert plan(capsys, *lm, "--trainer.precision=bf16-true")["peak"] == low["peak"]
    batch = next(c for text, c in alone.items() if "data.batch_size 8 " in text)
    changed = plan(capsys, *lm, "--data.batch_size=8", "--trainer.accumulate_grad_batches=2")
    assert changed["peak"] == batch["peak"]
    together = [c for c in found["changes"] if c["together"]]
    assert together and together[0]["fits"]


def test_dry_run_and_a_device_of_ones_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "devices.yaml"
    table.write_text(
        "toy: {memory: 4e9, flops: {float32: 1e12}, bandwidth: 1e11, interconnect: 1e10, price: 0.5}\n"
        "a100-80gb: {price: 1.0}\n"
    )
    found = plan(capsys, *SMALL, "--device=toy", "--devices=4", f"--device_table={table}", "--dry-run", "--length=256",
                 "--data.batch_size=2", "--trainer.strategy=ModelParallelStrategy",
                 "--trainer.max_steps=100")  # fmt: skip
    dry = found["dry_run"]
    assert dry["plan_to_dry_run"] == pytest.approx(1, abs=0.15)
    assert dry["communication"]["all_gather"] == pytest.approx(found["communication"]["all_gather"], rel=0.02)
    assert found["cost"] == pytest.approx(0.5 * found["device_hours"]) and found["tokens"] == 100 * 2 * 256 * 4
    own = plan(capsys, *SMALL, "--device=a100-80gb", f"--device_table={table}")
    assert own["cost"] == pytest.approx(own["device_hours"])


def test_the_machine_itself_and_a_checkpoint(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = support.trainer(tmp_path, callbacks=[support.LastCheckpoint(str(tmp_path / "lm"))], max_epochs=1)
    run.fit(support.language_model(), datamodule=support.text_data(tmp_path))
    found = plan(capsys, "--config=configs/finetune.yaml", f"--model.network={tmp_path}/lm/last.ckpt", "--device=cpu",
                 "--model.overrides={activation_checkpointing: true}", "--trainer.max_steps=10")  # fmt: skip
    config = support.config(vocab_size=ByteTokenizer().vocab_size)
    assert found["parameters"]["policy"] == sum(p.numel() for p in config.build().parameters())
    assert found["fits"] and found["device"]["memory"] > 2**30
    assert found["executed_flops_per_token"] > found["flops_per_token"], "the override counts"


@pytest.mark.parametrize(
    "argv, words",
    [
        ([*SMALL, "--device=b200"], ["b200", "a100-40gb, a100-80gb, h100, tpu-v4, cpu", "--device_table"]),
        ([*SMALL, "--device=h100", "--devices=0"], ["--devices", "above 0"]),
        ([*SMALL, "--device=h100", "--utilisation=40"], ["--utilisation", "share"]),
        ([*SMALL], ["--device"]),
        (["--config=configs/ppo.yaml", *MANY], ["runs/finetune/last.ckpt", "--network"]),
        ([*SMALL, "--device=h100", "--network=9b"], ["9b", "8b, 62b, 540b"]),
        ([*SMALL, "--device=h100", "--network=configs/ppo.yaml"], ["configs/ppo.yaml", "PaLMConfig"]),
        ([*PPO, "--device=h100", "--devices=96"], ["num_prompts 256", "96"]),
        ([*PPO, "--device=h100", "--devices=256"], ["minibatch_size 128", "256"]),
        ([*PPO, *MANY, "--prompt_length=2000"], ["2000", "2048"]),
        ([*SMALL, *MANY, "--trainer.strategy=ModelParallelStrategy",
          "--trainer.strategy.data_parallel_size=8", "--trainer.strategy.tensor_parallel_size=2"],
         ["64", "8 x", "data_parallel_size to 32"]),
        ([*SMALL, *MANY, "--trainer.strategy=deepspeed"], ["deepspeed", "ModelParallelStrategy"]),
        ([*SMALL, "--device=h100", "--trainer.precision=transformer-engine"], ["transformer-engine", "bf16-mixed"]),
        ([*SMALL, "--device=h100", "--length=5000"], ["5000", "1024"]),
        ([*SMALL, "--device=h100", "--model.objectiv=PPO"], ["objectiv"]),
        (["--config=configs/demo/finetune.yaml", "--device=h100", "--network=1m", "--data.tokenizer=null"],
         ["--vocab_size"]),
        ([*SMALL, "--device=h100", "--device_table=nowhere.yaml"], ["nowhere.yaml"]),
    ],
)  # fmt: skip
def test_bad_input(capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]) -> None:
    message = error(capsys, *argv)
    assert all(word in message for word in words), message


def test_a_bad_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = tmp_path / "devices.yaml"
    for text, words in (
        ("toy: {memory: 4e9}", ("toy lacks", "flops")),
        ("h100: {colour: green}", ("colour",)),
        ("h100: {memory: much}", ("h100.memory", "'much'")),
        ("h100: {flops: {int8: 1e12}}", ("h100.flops", "bfloat16")),
        ("[1]", ("must map names",)),
    ):
        table.write_text(text)
        message = error(capsys, *SMALL, "--device=h100", f"--device_table={table}")
        assert all(word in message for word in words), message
