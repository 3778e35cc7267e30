"""Which network of a checkpoint is exported, and its weights by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from lit_palm.data.tokenizers import Tokenizer
from lit_palm.models.huggingface_config import HuggingFaceConfig
from lit_palm.models.palm import PaLMConfig
from lit_palm.models.weights import Source
from lit_palm.modules.checkpoint import Checkpoint, Role, config_from_dict, read_checkpoint

__all__ = ["Chosen", "StoredWeights", "choose"]


@dataclass
class Chosen:
    """A network of a checkpoint that can be exported to transformers."""

    checkpoint: Checkpoint
    role: Role
    config: PaLMConfig | HuggingFaceConfig
    tokenizer: Tokenizer


class StoredWeights(Mapping[str, Tensor]):
    """The weights of one network of a checkpoint by name, whole, each read (or put together) when it is asked for."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.known = dict.fromkeys(source.names())

    def __getitem__(self, name: str) -> Tensor:
        shape = self.source.shape(name) if name in self.known else ()
        return self.source.rows(name, 0, shape[0] if shape else 1).reshape(tuple(shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self.known)

    def __len__(self) -> int:
        return len(self.known)


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
