"""Resuming under another number of ranks or strategy, from another place, and what is refused when it does not fit."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lit_palm.callbacks import LastCheckpoint
from lit_palm.cli import main
from lit_palm.modules.checkpoint import consolidate, read_checkpoint
from lit_palm.modules.safetensors_file import write_safetensors
from lit_palm.modules.weights import load_network
from lit_palm.objectives import LanguageModeling
from lit_palm.testing.processes import Program
from tests.modules import many_ranks
from tests.support import apart, config, language_model, same, sentence, text_data, trainer, write_jsonl

ROOT = Path(__file__).parents[2]
# a bias of the value head that starts at 0 differs by 4e-5 of its size (float32 sums in another order), others by 1e-6
TOLERANCE = 1e-4


def run(folder: Path, *arguments: Any) -> dict[str, Any]:
    """One run of tests/modules/many_ranks.py; what it resumed with and what it ended with."""
    result: dict[str, Any]
    if arguments[2] == "auto":  # needs no processes
        many_ranks.main(folder, *arguments[:5], str(arguments[5]) if len(arguments) > 5 else "")
        result = torch.load(folder / f"{arguments[4]}.pt", weights_only=True)
        return result
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = folder / f"{arguments[4]}.log"
    done = Program("tests.modules.many_ranks", [str(folder), *map(str, arguments)], output, environment, ROOT,
                   ranks=int(arguments[1])).finish()  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result = torch.load(folder / f"{arguments[4]}.pt", weights_only=True)
    result["text"] = done.stderr + done.stdout
    return result


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """PPO in the middle of collections: 4 ranks, 2, 1, one device without sharding, and 2 ranks from its plain file."""
    folder = tmp_path_factory.mktemp("chain")

    def last(name: str) -> Path:
        return folder / name / "last.ckpt"

    results = {
        "straight": run(folder, "policy", 1, "auto", 8, "straight"),
        "four": run(folder, "policy", 4, "sharded", 3, "four"),
        "two": run(folder, "policy", 2, "sharded", 5, "two", last("four"), "asynchronous"),
        "one": run(folder, "policy", 1, "sharded", 6, "one", last("two")),
        "plain": run(folder, "policy", 1, "auto", 8, "plain", last("one")),
        "back": run(folder, "policy", 2, "sharded", 8, "back", folder / "plain" / "step-00000007.ckpt", "asynchronous"),
    }
    return folder, results


def test_every_resumption_starts_with_the_very_bits_that_were_saved(
    chain: tuple[Path, dict[str, dict[str, Any]]],
) -> None:
    folder, results = chain
    for before, after in (("four", "two"), ("two", "one"), ("one", "plain")):
        same(results[before]["end"], results[after]["start"], f"{before} -> {after}")
    saved = read_checkpoint(folder / "plain" / "step-00000007.ckpt").state_dict
    same(dict(saved), {k: results["back"]["start"]["weights"][k] for k in saved})
    assert len(results["back"]["start"]["moments"]) == len(results["straight"]["end"]["moments"])


def test_the_chain_ends_where_a_run_on_one_device_does(chain: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    _, results = chain
    for name in ("plain", "back"):
        assert results[name]["end"]["step"] == 8
        for part in ("weights", "moments"):
            assert apart(results["straight"]["end"][part], results[name]["end"][part]) < TOLERANCE, (name, part)


def test_what_is_new_about_a_run_is_said_in_one_line(chain: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    _, results = chain
    lines = [line for line in results["two"]["text"].splitlines() if "other settings" in line]
    assert lines == [
        "resuming with other settings than the checkpoint's: ModelParallelStrategy on 4 ranks -> "
        "ModelParallelStrategy on 2 ranks"
    ]


# ------------------------------------------------------------------------------------------ a folder of shards


@pytest.fixture
def shards(chain: tuple[Path, dict[str, dict[str, Any]]], tmp_path: Path) -> Path:
    """A copy of what four ranks wrote."""
    return Path(shutil.copytree(chain[0] / "four" / "last.ckpt", tmp_path / "four.ckpt"))


def test_a_folder_of_shards_knows_what_it_is(shards: Path) -> None:
    header = read_checkpoint(shards, header_only=True).header
    assert header["world"] == {"strategy": "ModelParallelStrategy", "ranks": 4, "nodes": 1, "tensor_parallel": 1}
    assert header["files"] == {p.name: p.stat().st_size for p in shards.iterdir() if p.name != "meta.pt"}
    assert header["versions"].keys() == {"lit_palm", "torch", "lightning", "python"}


@pytest.mark.parametrize("name", ["__2_0.distcp", ".metadata"])
def test_a_missing_shard_is_named_with_how_many_ranks_wrote_it(name: str, shards: Path, tmp_path: Path) -> None:
    (shards / name).unlink()
    message = rf"four\.ckpt: {name} is missing, and 4 ranks wrote 5 files"
    with pytest.raises(ValueError, match=message):
        read_checkpoint(shards)
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=6).fit(language_model(), datamodule=text_data(tmp_path), ckpt_path=shards)
    assert main(["consolidate", str(shards), str(tmp_path / "out")]) == 2


def test_a_shard_that_was_cut_short_is_named(shards: Path) -> None:
    data = (shards / "__1_0.distcp").read_bytes()
    (shards / "__1_0.distcp").write_bytes(data[:-10])
    size = len(data)
    with pytest.raises(ValueError, match=rf"__1_0\.distcp holds {size - 10} bytes instead of {size}, and 4 ranks"):
        read_checkpoint(shards)


def test_a_folder_that_lightning_wrote_is_checked_by_its_own_index(shards: Path) -> None:
    meta = torch.load(shards / "meta.pt", weights_only=True)
    del meta["lit_palm"]["files"], meta["lit_palm"]["world"]
    torch.save(meta, shards / "meta.pt")
    assert read_checkpoint(shards).state_dict
    (shards / "__3_0.distcp").unlink()
    with pytest.raises(ValueError, match=r"__3_0\.distcp is missing, and 4 ranks wrote 4 files"):
        read_checkpoint(shards)


def test_shards_behind_a_url_are_as_good(shards: Path) -> None:
    import fsspec

    filesystem = fsspec.filesystem("memory")
    filesystem.put(str(shards), "/bucket/four.ckpt", recursive=True)
    filesystem.pipe_file("/bucket/last.ckpt", b"lit_palm checkpoint: four.ckpt\n")
    same(dict(read_checkpoint("memory://bucket/last.ckpt").state_dict), dict(read_checkpoint(shards).state_dict))


@pytest.mark.parametrize("place", ["url", "fsdp1"])
def test_shards_behind_a_url_and_those_of_fsdp1_resume_everywhere(place: str, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = Program("tests.modules.odd_places", [str(tmp_path), place], tmp_path / "log", environment, ROOT).finish()
    assert done.returncode == 0, done.stderr[-4000:]


# ------------------------------------------------------------------------------------------ consolidation


def test_shards_become_one_safetensors_file_a_network(
    chain: tuple[Path, dict[str, dict[str, Any]]], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["consolidate", str(shards), str(tmp_path / "out")]) == 0 and "wrote" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "policy.safetensors", "value.safetensors"
    ]  # fmt: skip
    weights = chain[1]["four"]["end"]["weights"]
    for role in ("policy", "value"):
        expected = {k.removeprefix(f"networks.{role}."): v for k, v in weights.items() if f".{role}." in k}
        same(load_file(tmp_path / "out" / f"{role}.safetensors"), expected)
    same(load_network(tmp_path / "out").state_dict(), load_network(shards).state_dict())


def test_shards_become_one_file_that_stages_start_from(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["consolidate", str(shards), str(tmp_path / "one.ckpt")]) == 0
    same(dict(read_checkpoint(tmp_path / "one.ckpt").state_dict), dict(read_checkpoint(shards).state_dict))
    module, data = language_model(network=str(tmp_path / "one.ckpt")), text_data(tmp_path, tokenizer=None)
    trainer(tmp_path, max_steps=1).fit(module, datamodule=data)
    # there is no optimiser in it, so no run to go on with
    for source in (tmp_path / "one.ckpt", tmp_path / "out"):
        consolidate(shards, tmp_path / "out")
        with pytest.raises(ValueError, match=r"holds weights only.*--model\.network"):
            trainer(tmp_path, max_steps=1).fit(language_model(), datamodule=text_data(tmp_path), ckpt_path=source)
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        consolidate(shards, shards)


def test_tensors_of_every_kind_are_written_as_safetensors_reads_them(tmp_path: Path) -> None:
    weights = {
        "flag": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "turned": torch.randn(4, 6).t(),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "count": torch.arange(7),
    }
    write_safetensors(str(tmp_path / "x.safetensors"), {k: k for k in weights}, weights)
    same(load_file(tmp_path / "x.safetensors"), weights)
    with pytest.raises(ValueError, match=r"odd is of type torch\.complex64"):
        write_safetensors(str(tmp_path / "y"), {"odd": "odd"}, {"odd": torch.zeros(2, dtype=torch.complex64)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


# ------------------------------------------------------------------------------------------ another run


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said about a run that is resumed."""
    lines: list[str] = []
    monkeypatch.setattr("lit_palm.modules.compatibility.rank_zero_info", lines.append)
    return lines


class Other(LanguageModeling):
    """The same loss under another name."""


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def refused(folder: Path, match: str, path: Path, data: Any = None, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        run = trainer(folder, max_steps=9)
        run.fit(language_model(**options), datamodule=data or text_data(folder), ckpt_path=path)


def saved(folder: Path, steps: int = 4) -> Path:
    last = LastCheckpoint(str(folder / "run"))
    trainer(folder, callbacks=[last], max_steps=steps).fit(language_model(), datamodule=text_data(folder))
    return folder / "run" / "last.ckpt"


def test_another_objective_optimiser_or_data_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    named = "the configuration names"
    refused(tmp_path, f"trained with LanguageModeling, {named} Other.*--model.network", path, objective=Other())
    refused(tmp_path, rf"trained with torch\.optim\.adamw\.AdamW, {named} .*SGD.*--model", path, optimizer=sgd)
    other = text_data(tmp_path / "other", count=23)
    refused(tmp_path, "saved after 4 batches of an epoch of other data.*resume with the data", path, other)
    refused(tmp_path, "saved after 4 batches of an epoch of other data, or of the same data in another order", path,
            text_data(tmp_path, seed=1))  # fmt: skip


def test_the_same_data_elsewhere_and_other_data_between_epochs_are_allowed(tmp_path: Path, said: list[str]) -> None:
    path = saved(tmp_path)
    moved = text_data(tmp_path / "elsewhere")
    trainer(tmp_path, max_steps=5).fit(language_model(), datamodule=moved, ckpt_path=path)
    path = saved(tmp_path, steps=6)  # an epoch
    other = text_data(tmp_path / "other", count=30)
    trainer(tmp_path, max_steps=8).fit(language_model(), datamodule=other, ckpt_path=path)
    assert "resuming with other settings than the checkpoint's: other data" in said


def test_settings_that_may_differ_are_named(tmp_path: Path, said: list[str]) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", [{"text": sentence(i)} for i in range(24)])
    network = {"class_path": "PaLMConfig", "init_args": {"d_model": 16, "num_layers": 1, "num_heads": 2, "head_dim": 8}}
    model = {"class_path": "LitLanguageModel", "init_args": {"network": network}}
    data = {"class_path": "TextData", "init_args": {"train": source, "tokenizer": "bytes", "sequence_length": 24}}
    last = {"class_path": "lit_palm.callbacks.LastCheckpoint", "init_args": {"dirpath": str(tmp_path / "run")}}
    flags = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "callbacks": [last], "max_steps": 2}
    (tmp_path / "run.yaml").write_text(json.dumps({"trainer": flags, "model": model, "data": data}))
    command = ["fit", "--config", str(tmp_path / "run.yaml")]
    assert main(command) == 0
    header = read_checkpoint(tmp_path / "run" / "last.ckpt").header
    assert header["config"]["trainer"]["max_steps"] == 2 and header["config"]["data"]["class_path"].endswith("TextData")
    assert json.loads(json.dumps(header["config"])) == header["config"]
    resume = [f"--ckpt_path={tmp_path}/run/last.ckpt", "--trainer.max_steps=3", "--trainer.gradient_clip_val=0.5"]
    assert main([*command, *resume]) == 0
    assert said == [
        "resuming with other settings than the checkpoint's: trainer.max_steps 2 -> 3; "
        "trainer.gradient_clip_val null -> 0.5"
    ]


def test_evaluation_asks_for_no_objective(tmp_path: Path) -> None:
    path = saved(tmp_path)
    trainer(tmp_path).validate(language_model(objective=Other()), datamodule=text_data(tmp_path), ckpt_path=path)


def test_a_checkpoint_of_the_first_format_without_the_new_entries_resumes(tmp_path: Path) -> None:
    path = saved(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    for name in ("versions", "config", "world", "data", "optimizer"):
        del checkpoint["lit_palm"][name]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    run = trainer(tmp_path, max_steps=5)
    run.fit(language_model(), datamodule=text_data(tmp_path), ckpt_path=tmp_path / "old.ckpt")
    assert run.global_step == 5


def test_another_shape_is_refused_before_shards_are_read(shards: Path, tmp_path: Path) -> None:
    module = language_model(network=config(d_model=32))
    with pytest.raises(ValueError, match="written by a policy module, this is a language_model one"):
        trainer(tmp_path, max_steps=9).fit(module, datamodule=text_data(tmp_path), ckpt_path=shards)
