"""Which network of a checkpoint is exported, and its weights by name."""

from __future__ import annotations

from dataclasses import dataclass

from lit_palm.data.tokenizers import Tokenizer
from lit_palm.models.huggingface_config import HuggingFaceConfig
from lit_palm.models.palm import PaLMConfig
from lit_palm.modules.checkpoint import Checkpoint, Role, config_from_dict, read_checkpoint

__all__ = ["Chosen", "choose"]


@dataclass
class Chosen:
    """A network of a checkpoint that can be exported to transformers."""

    checkpoint: Checkpoint
    role: Role
    config: PaLMConfig | HuggingFaceConfig
    tokenizer: Tokenizer


def choose(path: str, network: Role | None = None) -> Chosen:
    """Look at a checkpoint; its weights are not read.

    Args:
        path: a checkpoint: file, folder of shards, exported or imported folder.
        network: which of its networks; None: the policy, else the reward model, else the value network.

    Raises:
        ValueError: as `read_checkpoint`, it has no such network or no tokeniser, or transformers has no layout for it.
    """
    checkpoint = read_checkpoint(path, header_only=True)
    networks = checkpoint.header["networks"]
    roles: tuple[Role, ...] = ("policy", "reward", "value") if network is None else (network,)
    role = next((r for r in roles if r in networks), None)
    if role is None:
        raise ValueError(f"{path}: has no {network or 'network'}; it holds {', '.join(networks)}")
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise ValueError(f"{path}: carries no tokeniser, and what is exported needs one")
    config = config_from_dict(networks[role], path)
    if networks[role].get("pooling") == "mean":
        raise ValueError(
            f"{path}: its {role} network pools the mean over positions, and sequence classifiers of transformers read "
            "the last token: train with pooling: last, or keep it as it is with --format lit-palm"
        )
    if not isinstance(config, PaLMConfig | HuggingFaceConfig):
        raise ValueError(
            f"{path}: its {role} network is a {type(config).__name__}, for which transformers has no layout: --format "
            "lit-palm keeps it as it is"
        )
    return Chosen(checkpoint, role, config, tokenizer)
