"""The reward model of palm-rlhf-pytorch as a `ScalarNetwork`.

It pools the mean over positions into a linear head, which is our `pooling: mean`. It adds an embedding to prompts and
another to responses; a `ScalarNetwork` does not know which is which, so it takes these where they are equal (zero, as
they start) and is refused otherwise, unless the user wants the scores without them.
"""

from __future__ import annotations

import torch

from lit_palm.foreign.network import ForeignNetwork, Recipe, Weights
from lit_palm.foreign.tensors import Tensors

__all__ = ["scalar_head"]


def scalar_head(tensors: Tensors, ignore_segments: bool, result: ForeignNetwork) -> None:
    """Put the scalar head on a trunk.

    Args:
        tensors: the reward model.
        ignore_segments: leave its embeddings of prompt and response out where they differ.
        result: the trunk; becomes the reward model.

    Raises:
        ValueError: it has bins, or embeddings of prompt and response that differ.
    """
    where, d_model = tensors.where, result.config.d_model
    if "to_pred.0.weight" not in tensors or tensors.shape("to_pred.0.weight") != (1, d_model):
        bins = tensors.shape("to_pred.weight")[0] if "to_pred.weight" in tensors else "unknown"
        raise ValueError(
            f"{where}: a reward model with a head of {bins} bins (num_binned_output) has no scalar score that a reward "
            "network here could give: import one with a scalar head, or train one with LitRewardModel"
        )
    recipes = {f"trunk.{name}": recipe for name, recipe in result.weights.recipes.items()}
    dtype = tensors.dtype("to_pred.0.weight")
    recipes["head.weight"] = Recipe((1, d_model), dtype, lambda: tensors["to_pred.0.weight"])
    recipes["head.bias"] = Recipe((1,), dtype, lambda: torch.zeros(1))
    recipes["offset"] = Recipe((), torch.float32, lambda: torch.zeros(()))
    recipes["scale"] = Recipe((), torch.float32, lambda: torch.ones(()))
    zeros = torch.zeros(1, 1, d_model)
    prompt, response = (tensors.get(f"{kind}_embed", zeros) for kind in ("prompt", "response"))
    if torch.equal(prompt, response):
        # a reward network's embedding makes no logits, so that adding the same to every token's is exact
        embedding = recipes["trunk.embedding.weight"]
        if prompt.any():
            added = prompt.reshape(1, -1)
            make = embedding.make
            recipes["trunk.embedding.weight"] = Recipe(embedding.shape, embedding.dtype, lambda: make() + added)
            result.notes.append("added the embedding that prompts and responses share to every token's")
    elif not ignore_segments:
        raise ValueError(
            f"{where}: its prompt_embed and response_embed differ, and a reward network here is not told where the "
            "prompt ends: --segments ignore imports the scores that it gives without a prompt mask"
        )
    else:
        result.notes.append("WARNING: left out prompt_embed and response_embed: scores are those without a prompt mask")
    result.weights, result.role, result.pooling = Weights(recipes), "reward", "mean"
