"""From a configuration of `lit-palm fit`, as its own parser reads it, to a `Job`: no data, no weights, no devices."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lit_palm.models.palm import PRESETS, PaLMConfig
from lit_palm.plan.job import Job, NetworkShape, Precision, Sharding
from lit_palm.plan.likeness import palm_like
from lit_palm.plan.optimizers import optimizer_cost
from lit_palm.plan.sizes import Wishes, argument, class_of, sizes, steps

if TYPE_CHECKING:
    from lit_palm.modules.host import LitModule

__all__ = ["PRECISIONS", "config_of_word", "read_job"]

PRECISIONS = {
    "32-true": Precision("32-true", 4, 4, 4, False),
    "bf16-mixed": Precision("bf16-mixed", 4, 4, 2, True),
    "16-mixed": Precision("16-mixed", 4, 4, 2, True),
    "bf16-true": Precision("bf16-true", 2, 2, 2, False),
    "16-true": Precision("16-true", 2, 2, 2, False),
    "64-true": Precision("64-true", 8, 8, 8, False),
}
ALIASES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true", "None": "32-true"}


def read_job(module: LitModule, config: Any, wishes: Wishes) -> Job:
    """The run that a configuration describes.

    Args:
        module: the model as the parser builds it, without networks.
        config: the rest of the configuration: `trainer` and `data` as parsed.
        wishes: the number of devices, and what is to be read instead of what the configuration says.

    Raises:
        ValueError: naming the key and the way out.
    """
    if module.lora is not None:
        raise ValueError(
            "model.lora: the formulas of a plan are those of networks whose weights are all trained; leave it out (as "
            "--model.lora=null) for a bound from above"
        )
    precision = _precision(config.trainer.get("precision"))
    sharding = _sharding(module, config.trainer, wishes.devices)
    if sharding.casts:  # what the embedding gives has its type
        precision = dataclasses.replace(precision, residual=precision.compute)
    main = _main_config(module, config, wishes)
    trained, frozen = _networks(module, main, wishes)
    needs = frozenset(map(str, module.objective.needs))
    accumulate = int(config.trainer.get("accumulate_grad_batches") or 1)
    rows, length, targets, masked, collection = sizes(module, config.data, main, sharding, wishes)
    return Job(
        kind=module.kind,
        objective=type(module.objective).__name__,
        needs=needs,
        trained=trained,
        frozen=frozen,
        rows=rows,
        length=length,
        targets=targets,
        precision=precision,
        optimizer=optimizer_cost(module.optimizer, precision.weight),
        sharding=sharding,
        devices=wishes.devices,
        accumulate=accumulate,
        masked=masked,
        entropy_trained=bool(getattr(module.objective, "entropy_coef", 0)),
        collection=collection,
        kernels="host" if wishes.kernels == "host" else "accelerator",
        max_steps=steps(module, config.trainer, collection, accumulate),
    )


def _precision(value: Any) -> Precision:
    name = ALIASES.get(str(value), str(value))
    if name not in PRECISIONS:
        raise ValueError(f"trainer.precision {value}: a plan knows {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


# ---------------------------------------------------------------------------------------------- strategy


def _sharding(module: LitModule, trainer: Any, devices: int) -> Sharding:
    """How the strategy spreads weights over the devices; `model.sharding` refines it where the module has it."""
    name, options = class_of(trainer.get("strategy"))
    own = getattr(module, "sharding", None)
    wanted: dict[str, Any] = {}
    if own is not None:  # the modules' own defaults
        given = {"gather": "auto", "frozen": "sharded", "offload": False, "reshard_after_forward": True}
        wanted = {key: getattr(own, key, default) for key, default in given.items()}
        wanted |= {"reshard": wanted.pop("reshard_after_forward"), "gathers_all": False}
    if name.startswith("ModelParallelStrategy"):
        tensor = options.get("tensor_parallel_size", "auto")
        tensor = 1 if tensor == "auto" else int(tensor)
        data = options.get("data_parallel_size", "auto")
        data = max(1, devices // tensor) if data == "auto" else int(data)
        if data * tensor != devices:
            raise ValueError(
                f"--devices {devices}: ModelParallelStrategy has data_parallel_size {data} x tensor_parallel_size "
                f"{tensor}, which is {data * tensor}; set trainer.strategy.init_args.data_parallel_size to "
                f"{devices // tensor if devices % tensor == 0 else f'a part of {devices}'}"
            )
        shard = int(getattr(own, "shard_size", None) or data)
        if data % shard:
            raise ValueError(f"model.sharding.shard_size {shard} must divide the data parallel size {data}")
        return Sharding("fsdp2", data, tensor, shard, casts=_casts(own, trainer), **wanted)
    if name.startswith(("FSDPStrategy", "fsdp")):
        offload = bool(options.get("cpu_offload") or "offload" in name)
        return Sharding("fsdp1", devices, 1, devices, **{**wanted, "offload": offload})
    if devices == 1:
        return Sharding()
    if name in ("auto", "DDPStrategy") or name.startswith("ddp"):
        return Sharding("ddp", devices, 1, 1, **{k: v for k, v in wanted.items() if k == "frozen"})
    raise ValueError(
        f"trainer.strategy {name}: a plan knows auto, ddp, FSDPStrategy and ModelParallelStrategy; use one of these"
    )


def _casts(own: Any, trainer: Any) -> bool:
    """Whether weights are gathered in the compute type, as the modules' `sharding.param_dtype` says."""
    wanted = getattr(own, "param_dtype", "float32")
    mixed = _precision(trainer.get("precision")).autocast
    return mixed and (wanted == "auto" or wanted not in ("float32", "auto"))


# ---------------------------------------------------------------------------------------------- networks


def _main_config(module: LitModule, config: Any, wishes: Wishes) -> PaLMConfig:
    """The configuration of the first network, with its vocabulary."""
    if wishes.network is not None:
        found: Any = config_of_word(wishes.network)
    elif not isinstance(module.network, str):
        found = module.network
    elif os.path.exists(module.network) or "://" in module.network:
        from lit_palm.modules.checkpoint import read_config

        found = read_config(module.network)
    else:
        raise ValueError(
            f"model.network names {module.network!r}, which does not exist yet: say what it will hold with --network "
            f"({', '.join(PRESETS)}, or a YAML file such as configs/palm/8b.yaml)"
        )
    if isinstance(module.network, str) and module.overrides:
        found = dataclasses.replace(found, **module.overrides)
    vocab = wishes.vocab_size or found.vocab_size or _vocab_of(config.data, wishes)
    return palm_like(dataclasses.replace(found, vocab_size=vocab), wishes.notes)


def config_of_word(word: str) -> PaLMConfig:
    """A preset by name, or the PaLM that a YAML file describes, at its top or anywhere below.

    Raises:
        ValueError: it is neither.
    """
    if word.lower() in PRESETS:
        return PaLMConfig.preset(word.lower())
    try:
        loaded = yaml.safe_load(Path(word).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(
            f"--network {word}: neither one of {', '.join(PRESETS)} nor a YAML file that can be read"
        ) from error
    fields = {f.name for f in dataclasses.fields(PaLMConfig)}
    for entry in _mappings(loaded):
        arguments = entry.get("init_args", {}) if "class_path" in entry else entry
        named = str(entry.get("class_path", "PaLMConfig")).rpartition(".")[2] == "PaLMConfig"
        if named and isinstance(arguments, dict) and arguments and arguments.keys() <= fields:
            return PaLMConfig(**arguments)
    raise ValueError(f"--network {word}: holds no PaLMConfig; write {{class_path: PaLMConfig, init_args: {{...}}}}")


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from _mappings(part)


def _vocab_of(data: Any, wishes: Wishes) -> int:
    """The size of the vocabulary that the data's tokeniser has, as far as its configuration tells."""
    tokenizer = argument(data, "tokenizer")
    name, options = class_of(tokenizer) if not isinstance(tokenizer, str) else (tokenizer, {})
    if "vocab_size" in options:
        wishes.notes.append(f"vocabulary of {options['vocab_size']} ids, as data.tokenizer asks for")
        return int(options["vocab_size"])
    if tokenizer is not None and (name in ("bytes", "ByteTokenizer") or os.path.exists(name)):
        from lit_palm.data.tokenizers import ByteTokenizer, load_tokenizer

        return (ByteTokenizer() if name in ("bytes", "ByteTokenizer") else load_tokenizer(name)).vocab_size
    raise ValueError("the size of the vocabulary is not known before a tokeniser is trained: say --vocab_size")


def _networks(
    module: LitModule, main: PaLMConfig, wishes: Wishes
) -> tuple[dict[str, NetworkShape], dict[str, NetworkShape]]:
    """The trained and the frozen networks by name."""
    if module.kind == "reward":
        return {"reward": NetworkShape(main, scalar=True)}, {}
    trained = {"policy": NetworkShape(main)}
    frozen: dict[str, NetworkShape] = {}
    if module.kind != "policy":
        return trained, frozen
    from lit_palm.rollout.rewards import RewardModel, every_reward

    rewards = [r for r in every_reward(getattr(module, "rewards", [])) if isinstance(r, RewardModel)]
    shapes = {r.name: _of_checkpoint(r.checkpoint, f"reward {r.name}", main, wishes) for r in rewards}
    if "value" in module.objective.needs:
        source = getattr(module, "value", None) or (rewards[0].checkpoint if rewards else None)
        shape = _of_checkpoint(source, "the value network", main, wishes) if source else main
        trained["value"] = NetworkShape(shape, scalar=True)
    if getattr(module, "precomputed", None) is None:  # validation asks for a reference whatever the objective needs
        source = getattr(module, "reference", None)
        frozen["reference"] = NetworkShape(_of_checkpoint(source, "the reference", main, wishes) if source else main)
    frozen |= {f"reward/{name}": NetworkShape(shape, scalar=True) for name, shape in shapes.items()}
    return trained, frozen


def _of_checkpoint(path: str, what: str, main: PaLMConfig, wishes: Wishes) -> PaLMConfig:
    """The network of a checkpoint; one that does not exist yet is taken to be like the policy."""
    if os.path.exists(path) or "://" in path:
        from lit_palm.modules.checkpoint import read_config

        return palm_like(read_config(path), wishes.notes)
    note = f"{what} ({path}, not there yet) is taken to be of the policy's size"
    if note not in wishes.notes:
        wishes.notes.append(note)
    return main
