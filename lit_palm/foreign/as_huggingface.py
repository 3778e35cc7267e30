"""A network of transformers, trained here, back in the layout that it came from: what `save_pretrained` writes.

The weights of a checkpoint are put into the model on the meta device without a copy, those of a file mapped from disk,
and transformers writes them, since it knows how each architecture's files are named and split. A scalar network becomes
the architecture's sequence classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_palm.data.tokenizers import Tokenizer
from lit_palm.foreign.as_cohere import scalar_head
from lit_palm.models.huggingface_config import HuggingFaceConfig, read_architecture
from lit_palm.models.weights import named_weights

__all__ = ["huggingface_model"]


def huggingface_model(
    config: HuggingFaceConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype | None,
    where: str,
) -> tuple[Any, float | None]:
    """The model of transformers with the weights of a checkpoint.

    Args:
        config: of the network.
        weights: of the network, by their names in a checkpoint.
        tokenizer: gives the special ids.
        dtype: of the weights; None: as they are.
        where: the checkpoint, for errors.

    Returns:
        The model, and for a scalar network the constant that its score leaves out.

    Raises:
        ValueError: transformers has no such model, or the weights do not fit it.
    """
    scalar = "head.weight" in weights
    prefix = "trunk.lm." if scalar else "lm."
    state = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
    own = read_architecture(config.architecture, config.code)
    _set_tokens(own, config, tokenizer)
    bias: float | None = None
    if scalar:
        own.num_labels = 1
        recipe, bias = scalar_head(weights, weights["head.weight"].dtype)
        state["score.weight"] = recipe.make()
    if dtype is not None:
        state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    kept = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    with torch.device("meta"):
        model = _classifier(own, where) if scalar else _language_model(own, config)
    wanted = {name for name, _ in named_weights(model)}
    if scalar:  # the output weight of a language model, which a classifier has not
        state = {name: tensor for name, tensor in state.items() if name in wanted}
    lost, unknown = sorted(wanted - state.keys()), sorted(state.keys() - wanted)
    if lost or unknown:
        names = ", ".join((lost or unknown)[:3])
        raise ValueError(
            f"{where}: its weights {'lack' if lost else 'have'} {names}, which {type(model).__name__} of transformers "
            f"{'needs' if lost else 'does not know'}"
        )
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    for part in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
        part.dtype = kept
    return model, bias


def _language_model(own: Any, config: HuggingFaceConfig) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(own, trust_remote_code=config.code is not None)


def _classifier(own: Any, where: str) -> Any:
    """The architecture's sequence classifier, or transformers' generic one over its trunk where it has none.

    Raises:
        ValueError: it has none, and the generic one does not fit its trunk.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    from transformers.modeling_layers import GenericForSequenceClassification

    classifiers: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    language_models: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if type(own) in classifiers:
        return classifiers[type(own)](own)
    if type(own) in language_models:
        known = language_models[type(own)]
        bases = [cls for cls in known.__mro__ if cls.__name__ == f"{type(own).__name__[:-6]}PreTrainedModel"]
        if bases and known.base_model_prefix == "model":
            name = bases[0].__name__.replace("PreTrainedModel", "ForSequenceClassification")
            made: type[Any] = type(name, (GenericForSequenceClassification, bases[0]), {})
            return made(own)
    raise ValueError(
        f"{where}: transformers has no sequence classifier for the architecture {own.model_type!r}: --format lit-palm "
        "keeps the reward model as it is"
    )


def _set_tokens(own: Any, config: HuggingFaceConfig, tokenizer: Tokenizer) -> None:
    """The special ids that the network was trained with here, where the configuration says something else."""
    for part in {id(c): c for c in (own, own.get_text_config(decoder=True))}.values():
        part.vocab_size = config.vocab_size
        ends = part.eos_token_id if isinstance(part.eos_token_id, list) else [part.eos_token_id]
        if tokenizer.eos_id not in ends:
            part.eos_token_id = tokenizer.eos_id
        if tokenizer.bos_id is not None:
            part.bos_token_id = tokenizer.bos_id
        part.pad_token_id = tokenizer.pad_id
