"""Whether a module can run an objective, and go on from a checkpoint; every reason why not is one clear error."""

from __future__ import annotations

from typing import Any, get_args

from torch import nn

from lit_palm.models.base import Network, NetworkConfig, ScalarNetwork
from lit_palm.modules.checkpoint import FORMAT
from lit_palm.objectives.base import Kind, Need, Objective
from lit_palm.parallel.sharded import bare

__all__ = ["check_objective", "check_resumable", "config_of"]

MODULES: dict[str, str] = {"language_model": "LitLanguageModel", "reward": "LitRewardModel", "policy": "LitPolicy"}
"""Which module runs objectives of a kind."""


def check_objective(objective: Objective, module: str, kind: Kind) -> None:
    """Refuse an objective that a module cannot run.

    Args:
        objective: what to optimise.
        module: name of the module's class.
        kind: the objectives it runs.

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
    unknown = sorted(objective.needs - set(get_args(Need)))
    if unknown:
        raise ValueError(
            f"{name} needs {', '.join(map(repr, unknown))}, which nothing provides: needs may hold "
            f"{', '.join(get_args(Need))}"
        )


def config_of(network: nn.Module) -> NetworkConfig:
    """Configuration of a network, or of the trunk below its scalar head."""
    network = bare(network)
    trunk = network.trunk if isinstance(network, ScalarNetwork) else network
    assert isinstance(trunk, Network)
    return trunk.config


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
    for role, config in own["networks"].items():
        _check_network(role, header["networks"].get(role), config, config_of(networks[role]).CHANGEABLE)
    return header


def _check_network(role: str, there: dict[str, Any] | None, here: dict[str, Any], free: frozenset[str]) -> None:
    if there is None or there["class_path"] != here["class_path"]:
        raise ValueError(f"the checkpoint to resume has no {here['class_path']} as {role}")
    fields = {"pooling": (there.get("pooling"), here.get("pooling"))}
    fields |= {k: (there["init_args"].get(k), here["init_args"][k]) for k in here["init_args"].keys() - free}
    for key, (theirs, ours) in fields.items():
        if theirs != ours:
            raise ValueError(f"the checkpoint to resume has {key} {theirs!r} in its {role}, the configuration {ours!r}")
