"""What a causal language model of `transformers` is, as plain data; the network is in `lit_palm.models.huggingface`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

from lit_palm.models.base import Network, NetworkConfig

__all__ = ["HuggingFaceConfig", "check_supported", "plain_architecture", "read_architecture"]

Attention = Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"]

_LENGTHS = ("max_position_embeddings", "n_positions", "seq_length", "max_sequence_length", "n_ctx")
_LEARNED = frozenset({"gpt2", "opt", "gpt_neo", "gpt_bigcode", "xglm", "biogpt", "openai-gpt"})
"""Model types whose positions are rows of a table, so that there is nothing beyond it."""


@dataclass
class HuggingFaceConfig(NetworkConfig):
    """A causal language model of `transformers` as plain data.

    Raises:
        ValueError: `transformers` knows no such model, or it is of a kind that cannot be run here: what is missing.
    """

    API_VERSION: ClassVar[int] = 1
    CHANGEABLE: ClassVar[frozenset[str]] = frozenset(
        {"dropout", "activation_checkpointing", "attention", "max_length", "code"}
    )

    architecture: dict[str, Any] = field(default_factory=dict)
    """What `config.json` of the model says; `model_type` at least."""
    vocab_size: int | None = None
    """Number of token ids; None takes it from `architecture`, or from the tokeniser."""
    d_model: int = 0
    """Width of the hidden states that the output weight reads; 0 takes it from `architecture`."""
    max_length: int = 0
    """Longest sequence in tokens; 0 takes it from `architecture`."""
    dropout: float = 0.0
    """For every dropout of the model, while training."""
    activation_checkpointing: bool = False
    """Keep only block inputs for the backward pass and recompute the rest."""
    attention: Attention = "auto"
    """Which attention of `transformers` runs; `auto`: scaled dot product attention where the model has it, Flash
    Attention 2 for 16-bit weights on a GPU that has it."""
    code: str | None = None
    """Folder or hub name of the Python files that define the architecture; only ever set by a user who allowed them."""

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, dict) or "model_type" not in self.architecture:
            raise ValueError(
                "HuggingFaceConfig.architecture needs a model_type, such as {model_type: llama, hidden_size: 512}; to "
                "start from a folder or a hub name, write that as model.network itself"
            )
        if self.attention not in get_args(Attention):
            raise ValueError(
                f"HuggingFaceConfig.attention is {self.attention!r}: choose {', '.join(get_args(Attention))}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"HuggingFaceConfig.dropout is {self.dropout}: choose a share from 0 up to 1, without it")
        own = self.of_transformers
        check_supported(own, self.code)
        self.vocab_size = self.vocab_size or self.architecture.get("vocab_size")
        self.d_model = self.d_model or int(getattr(own, "word_embed_proj_dim", None) or own.hidden_size)
        longest = next((int(n) for key in _LENGTHS if (n := getattr(own, key, None))), 0)
        self.max_length = self.max_length or longest or 2048
        if own.model_type in _LEARNED and self.max_length > longest:
            raise ValueError(
                f"HuggingFaceConfig.max_length is {self.max_length}, but a {own.model_type} has a table of {longest} "
                "positions: choose at most that"
            )

    @cached_property
    def of_transformers(self) -> Any:
        """The configuration object of `transformers` (of the text, where a model also sees images)."""
        return read_architecture(self.architecture, self.code).get_text_config(decoder=True)

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return int(self.of_transformers.num_hidden_layers)

    @property
    def num_heads(self) -> int:
        """Number of query heads."""
        return int(self.of_transformers.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return int(getattr(self.of_transformers, "head_dim", None) or self.d_model // self.num_heads)

    def build(self) -> Network:
        """Make the network with fresh weights; see `NetworkConfig.build`."""
        from lit_palm.models.huggingface import HuggingFaceNetwork

        return HuggingFaceNetwork(self)


def read_architecture(architecture: dict[str, Any], code: str | None = None) -> Any:
    """The configuration object of `transformers` that plain data describes.

    Raises:
        ValueError: the installed `transformers` does not know the model type, or refuses the values.
    """
    import transformers

    values = {key: value for key, value in architecture.items() if key != "model_type"}
    try:
        if code is not None:
            return transformers.AutoConfig.from_pretrained(code, trust_remote_code=True, **values)
        return transformers.AutoConfig.for_model(architecture["model_type"], **values)
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"transformers {transformers.__version__} cannot read the architecture {architecture['model_type']!r} "
            f"({why}): install a newer transformers, or convert the model to an architecture it knows"
        ) from error


def check_supported(config: Any, code: str | None = None) -> None:
    """Refuse models that are no causal language model with a key/value cache and a plain output matrix.

    Raises:
        ValueError: says what is missing.
    """
    kind = config.model_type
    cls = None if code is not None else _model_class(config)
    missing = None
    if code is None and cls is None:
        missing = "transformers has no causal language model (…ForCausalLM) for it"
    elif getattr(config, "is_encoder_decoder", False):
        missing = "it is an encoder with a decoder, not a causal language model"
    elif cls is not None and getattr(cls, "_is_stateful", False):
        missing = "it keeps a state instead of keys and values, so it lacks a cache whose rows can be chosen"
    elif getattr(config, "final_logit_softcapping", None):
        missing = "its logits pass a softcap (final_logit_softcapping), which chunked log-probabilities lack"
    if missing:
        raise ValueError(f"the architecture {kind!r} is not supported: {missing}")


def _model_class(config: Any) -> Any:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    found = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, (list, tuple)) else found


def plain_architecture(config: Any) -> dict[str, Any]:
    """What of a configuration object of `transformers` differs from its defaults, as plain data."""
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    for key in (
        "transformers_version",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "use_cache",
        "quantization_config",
        "lit_palm",
    ):
        plain.pop(key, None)
    return plain | {"model_type": config.model_type, "vocab_size": config.get_text_config(decoder=True).vocab_size}
