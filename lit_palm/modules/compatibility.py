"""Whether a module can run an objective, and go on from a checkpoint; every reason why not is one clear error."""

from __future__ import annotations

from typing import Any, get_args

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lit_palm.models.base import Network, NetworkConfig, ScalarNetwork
from lit_palm.modules.checkpoint import FORMAT
from lit_palm.modules.origin import class_path, differences
from lit_palm.objectives.base import Kind, Need, Objective
from lit_palm.parallel.sharded import bare
from lit_palm.rollout.collector import RolloutConfig
from lit_palm.rollout.engine_base import Engine
from lit_palm.rollout.sampling import Sampling

__all__ = [
    "check_extras",
    "check_objective",
    "check_optimizer",
    "check_reference",
    "check_resumable",
    "check_rewards",
    "check_same_run",
    "check_sampling",
    "samples_elsewhere",
    "config_of",
    "language_model_of",
]

MODULES: dict[str, str] = {"language_model": "LitLanguageModel", "reward": "LitRewardModel", "policy": "LitPolicy"}
"""Which module runs objectives of a kind."""


def check_objective(objective: Objective, module: str, kind: Kind, lora: bool = False) -> None:
    """Refuse an objective that a module cannot run.

    Args:
        objective: what to optimise.
        module: name of the module's class.
        kind: the objectives it runs.
        lora: it trains adapters.

    Raises:
        ValueError: the objective is of another kind, or needs what nothing provides.
    """
    name = type(objective).__name__
    if objective.kind not in MODULES:
        raise ValueError(
            f"{name} is of kind {objective.kind!r}, which nothing runs: choose one of {', '.join(MODULES)}"
        )
    if objective.kind != kind:
        raise ValueError(
            f"{module} runs objectives of kind {kind!r}; {name} is of kind {objective.kind!r}: use "
            f"{MODULES[objective.kind]}"
        )
    if lora and objective.extras:
        raise ValueError(
            f"{name} trains a network of its own, with parts that adapters would freeze: leave model.lora out; "
            "model.unfrozen_layers trains its topmost blocks alone"
        )
    unknown = sorted(objective.needs - set(get_args(Need)))
    if unknown:
        raise ValueError(
            f"{name} needs {', '.join(map(repr, unknown))}, which nothing provides: needs may hold "
            f"{', '.join(get_args(Need))}"
        )


def check_reference(objective: Objective, precomputed: bool, follows: bool, lora: bool) -> None:
    """Refuse a way to hold the reference that does not go with the rest.

    Args:
        objective: what to optimise.
        precomputed: its log-probabilities are computed in advance.
        follows: it follows the policy.
        lora: it shares its weights with the policy.

    Raises:
        ValueError: naming the setting, and the way out.
    """
    name = type(objective).__name__
    if precomputed and follows:
        raise ValueError("model.precompute_reference and model.reference_update exclude each other: choose one")
    if precomputed and "reference" not in objective.needs:
        raise ValueError(f"model.precompute_reference: {name} needs no reference: leave it out")
    if precomputed and "rollouts" in objective.needs:
        raise ValueError(
            f"model.precompute_reference: {name} samples its completions, so there is nothing to compute in advance: "
            "leave it out"
        )
    if follows and lora:
        raise ValueError(
            "model.reference_update mixes the policy's weights into the reference's, and with model.lora both are the "
            "same frozen weights: leave one of the two out"
        )


def check_rewards(objective: Objective, names: list[str]) -> None:
    """Refuse rewards that cannot be told apart, or none where there must be one.

    Raises:
        ValueError: naming the way out.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"rewards are logged by name, and two of {names} share one: set `name` on one of them")
    if "reward" in objective.needs and not names:
        raise ValueError(
            f"{type(objective).__name__} needs a reward: add one under model.rewards, for example "
            "{class_path: RewardModel, init_args: {checkpoint: ...}} or a PythonReward"
        )


def check_extras(objective: Objective, network: nn.Module) -> None:
    """Refuse a network that lacks what an objective reads beside log-probabilities.

    Raises:
        ValueError: naming both, and what is missing.
    """
    own = language_model_of(network)
    missing = sorted(objective.extras - own.extras)
    if missing:
        raise ValueError(
            f"{type(objective).__name__} reads {', '.join(missing)}, which {type(own.config).__name__} does not give: "
            "name the network that this objective was written for as model.network"
        )


def language_model_of(network: nn.Module) -> Network:
    """A network itself, or the trunk below its scalar head."""
    network = bare(network)
    trunk = network.trunk if isinstance(network, ScalarNetwork) else network
    assert isinstance(trunk, Network)
    return trunk


def config_of(network: nn.Module) -> NetworkConfig:
    """Configuration of a network, or of the trunk below its scalar head."""
    return language_model_of(network).config


def check_resumable(header: dict[str, Any] | None, own: dict[str, Any], networks: nn.ModuleDict) -> dict[str, Any]:
    """Compare a checkpoint's header with the one this run would write.

    Args:
        header: the checkpoint's `lit_palm` entry, if it has one.
        own: what the module's `header()` gives now.
        networks: the module's networks by role.

    Returns:
        The header.

    Raises:
        ValueError: another format, kind, tokeniser, architecture or shape; says which, and the way out.
    """
    if header is None:
        raise ValueError("the checkpoint to resume has no `lit_palm` entry: it was not written by lit_palm")
    if header.get("format") != FORMAT:
        raise ValueError(f"the checkpoint to resume has format {header.get('format')!r}, this version {FORMAT}")
    if header["kind"] != own["kind"]:
        raise ValueError(
            f"the checkpoint to resume was written by a {header['kind']} module, this is a {own['kind']} one; to "
            "start a stage from another's result, name it with --model.network instead of --ckpt_path"
        )
    if header["tokenizer"] != own["tokenizer"]:
        raise ValueError("the checkpoint to resume was trained with another tokeniser than the data brings")
    split, ours = ((side.get("world") or {}).get("tensor_parallel", 1) for side in (header, own))
    if (split > 1) != (ours > 1):  # the matrices of a block are kept apart, and so is what the optimiser knows of them
        raise ValueError(
            f"the checkpoint to resume was written with tensor_parallel_size {split}, the strategy has {ours}: "
            f"resume it {'with' if split > 1 else 'without'} tensor parallelism, or start a new run "
            "from its weights with --model.network"
        )
    for role, config in own["networks"].items():
        _check_network(role, header["networks"].get(role), config, config_of(networks[role]).CHANGEABLE)
    return header


def check_same_run(checkpoint: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuse to go on with training as another one, and say which settings of it are new.

    Args:
        checkpoint: what is resumed; its header has passed `check_resumable`.
        own: what the module's `header()` gives now.

    Raises:
        ValueError: another objective, or in the middle of an epoch other data.
    """
    header = checkpoint["lit_palm"]
    theirs, ours = header["objective"]["class_path"], own["objective"]["class_path"]
    if theirs != ours:
        raise ValueError(
            f"the checkpoint to resume was trained with {theirs.rpartition('.')[2]}, the configuration names "
            f"{ours.rpartition('.')[2]}; to go on with another objective, start a new run from its weights with "
            "--model.network instead of --ckpt_path"
        )
    before, now = header.get("data") or {}, own.get("data") or {}
    position = checkpoint.get((before.get("class_path") or "").rpartition(".")[2])
    batch = position.get("batch", 0) if isinstance(position, dict) else 0
    if batch and before.get("fingerprint") and before["fingerprint"] != now.get("fingerprint"):
        raise ValueError(
            f"the checkpoint to resume was saved after {batch} batches of an epoch of other data, or of the same data "
            "in another order or length: resume with the data, tokeniser and data settings it was written with, or "
            "start a new run from its weights with --model.network"
        )
    new = differences(header.get("config") or {}, own.get("config") or {}) if header.get("config") else []
    new = [line for line in new if line.partition(" ")[0] not in _ITS_OWN]
    if (before.get("fingerprint"), before.get("class_path")) != (now.get("fingerprint"), now.get("class_path")):
        new += ["other data"] if before.get("fingerprint") else []
    if (header.get("world") or own["world"]) != own["world"]:
        new.append(f"{_ranks(header['world'])} -> {_ranks(own['world'])}")
    if new:
        more = f"; and {len(new) - 12} more" if len(new) > 12 else ""
        rank_zero_info(f"resuming with other settings than the checkpoint's: {'; '.join(new[:12])}{more}")


_ITS_OWN = {"ckpt_path", "weights_only"}
"""Settings that say how a run is resumed."""


def _ranks(world: dict[str, Any]) -> str:
    return f"{world['strategy']} on {world['ranks']} rank{'s' if world['ranks'] > 1 else ''}"


def check_optimizer(header: dict[str, Any], optimizers: list[Any]) -> None:
    """Refuse the state of another optimiser.

    Raises:
        ValueError: naming both classes, and the way out.
    """
    theirs = (header.get("optimizer") or {}).get("class_path")
    if theirs and optimizers and theirs != class_path(optimizers[0]):
        raise ValueError(
            f"the checkpoint to resume was trained with {theirs}, the configuration names {class_path(optimizers[0])}: "
            "the state of one means nothing to the other. Name the same optimiser, or start a new run from its weights "
            "with --model.network"
        )


def _check_network(role: str, there: dict[str, Any] | None, here: dict[str, Any], free: frozenset[str]) -> None:
    if there is None or there["class_path"] != here["class_path"]:
        raise ValueError(f"the checkpoint to resume has no {here['class_path']} as {role}")
    fields = {"pooling": (there.get("pooling"), here.get("pooling"))}
    fields |= {k: (there["init_args"].get(k), here["init_args"][k]) for k in here["init_args"].keys() - free}
    for key, (theirs, ours) in fields.items():
        if theirs != ours:
            raise ValueError(f"the checkpoint to resume has {key} {theirs!r} in its {role}, the configuration {ours!r}")
    _check_lora(role, there.get("lora"), here.get("lora"))


def _check_lora(role: str, there: dict[str, Any] | None, here: dict[str, Any] | None) -> None:
    if (there is None) != (here is None):
        trained = "all weights" if there is None else "a LoRA adapter"
        raise ValueError(
            f"the checkpoint to resume trained {trained} as {role}: resume it {'without' if there is None else 'with'} "
            "model.lora, or start a new run from it with --model.network"
        )
    if there is None or here is None:
        return
    if there["base"]["fingerprint"] != here["base"]["fingerprint"]:
        raise ValueError(
            f"the checkpoint to resume has its {role} on other frozen weights than this run (those of "
            f"{there['base']['path']}): name the same model.network, and do not change that file"
        )
    for key in ("rank", "alpha", "targets", "rslora", "dora", "quantize"):
        if there[key] != here[key]:
            raise ValueError(
                f"the checkpoint to resume has lora.{key} {there[key]!r} in its {role}, the configuration {here[key]!r}"
            )


def check_sampling(engine: Engine, sampling: Sampling, objective: Objective) -> None:
    """Refuse settings of sampling.

    Raises:
        ValueError: nothing could be learned from the samples, or the engine cannot keep to the settings.
    """
    if "rollouts" in objective.needs and sampling.temperature <= 0:
        raise ValueError("sampling.temperature must be positive to learn from samples; 1.0 is usual")
    engine.check(sampling)


def samples_elsewhere(engine: Engine, rollout: RolloutConfig, objective: Objective) -> bool:
    """Whether completions come from other kernels or older weights than those trained."""
    return "rollouts" in objective.needs and (engine.apart or rollout.asynchronous)
