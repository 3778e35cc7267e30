"""Rows, lengths and steps of a run, from the data and Trainer parts of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lit_palm.models.palm import PaLMConfig
from lit_palm.plan.job import Collection, Sharding

if TYPE_CHECKING:
    from lit_palm.modules.host import LitModule

__all__ = ["Wishes", "argument", "class_of", "sizes", "steps"]


@dataclass(frozen=True)
class Wishes:
    """What the command line says beside the configuration."""

    devices: int = 1
    network: str | None = None
    vocab_size: int | None = None
    length: int | None = None
    prompt_length: int | None = None
    answers: int = 2
    kernels: str = "accelerator"
    notes: list[str] = field(default_factory=list)
    """Filled with what was assumed."""


def class_of(value: Any) -> tuple[str, Mapping[str, Any]]:
    """Name and arguments of a class in a configuration, or of a strategy written as a word."""
    if value is None or isinstance(value, str):
        return value or "auto", {}
    if isinstance(value, Mapping) or hasattr(value, "get"):
        options = value.get("init_args") or {}
        options = options if isinstance(options, Mapping) else vars(options)
        return str(value.get("class_path")).rpartition(".")[2], options
    return type(value).__name__, {}


def argument(data: Any, name: str) -> Any:
    options = (data.get("init_args") or {}) if data is not None else {}
    return options.get(name)


def sizes(
    module: LitModule, data: Any, main: PaLMConfig, sharding: Sharding, wishes: Wishes
) -> tuple[int, int, int, bool, Collection | None]:
    """Rows and length of a micro-batch of one device, its targets, whether it is masked, and the collection."""
    if "rollouts" in module.objective.needs:
        collection = _collection(module, data, main, sharding, wishes)
        rows = collection.minibatch // sharding.data
        return (
            rows,
            collection.prompt_length + collection.new_tokens,
            rows * collection.new_tokens,
            False,
            collection,
        )
    name = class_of(data)[0]
    length = wishes.length or argument(data, "sequence_length") or argument(data, "max_length")
    if length is None:
        length = main.max_length
        wishes.notes.append(f"rows of {length} tokens, the network's context; say --length if the data's are shorter")
    if length > main.max_length:
        raise ValueError(f"rows of {length} tokens are more than the network's max_length ({main.max_length})")
    rows = int(argument(data, "batch_size") or 16)
    if name == "PreferenceData":
        rows *= wishes.answers
        wishes.notes.append(f"{wishes.answers} answers a prompt (--answers), none sharing its prompt's encoding")
    masked = bool(argument(data, "pack")) and name in ("TextData", "DemonstrationData")
    return rows, int(length), rows * (int(length) - 1), masked, None


def _collection(module: LitModule, data: Any, main: PaLMConfig, sharding: Sharding, wishes: Wishes) -> Collection:
    from lit_palm.rollout.rewards import RewardModel, every_reward

    policy: Any = module
    config, sampling = policy.rollout, policy.sampling
    if config.num_prompts % sharding.data:
        raise ValueError(
            f"rollout.num_prompts {config.num_prompts} must be a multiple of the {sharding.data} groups of devices "
            "that read different prompts"
        )
    if config.minibatch_size % sharding.data:
        raise ValueError(
            f"rollout.minibatch_size {config.minibatch_size} must be a multiple of the {sharding.data} groups of "
            "devices that read different rows"
        )
    kept = policy.objective.num_kept(config.num_prompts, config.completions_per_prompt)
    if kept % config.minibatch_size:
        raise ValueError(
            f"rollout.minibatch_size {config.minibatch_size} does not divide the {kept} rows of a collection"
        )
    room = main.max_length - sampling.max_new_tokens
    if room < 1:
        raise ValueError(
            f"sampling.max_new_tokens {sampling.max_new_tokens} leaves no room in {main.max_length} tokens"
        )
    prompt = wishes.prompt_length or argument(data, "max_prompt_length")
    if prompt is None:
        prompt = room
        wishes.notes.append(f"prompts of {prompt} tokens, all that fits; say --prompt_length if yours are shorter")
    if prompt > room:
        raise ValueError(
            f"prompts of {prompt} tokens and {sampling.max_new_tokens} new ones are more than the network's max_length "
            f"({main.max_length})"
        )
    models = [r for r in every_reward(policy.rewards) if isinstance(r, RewardModel)]
    return Collection(
        num_prompts=config.num_prompts,
        completions=config.completions_per_prompt,
        prompt_length=int(prompt),
        new_tokens=sampling.max_new_tokens,
        batch_size=config.batch_size,
        reward_batch=max((r.batch_size for r in models), default=config.batch_size),
        passes=config.passes,
        minibatch=config.minibatch_size,
        engine_batch=getattr(policy.engine, "max_batch_size", None),
    )


def steps(module: LitModule, trainer: Any, collection: Collection | None, accumulate: int) -> int:
    """Optimiser steps of the run; -1 when the configuration does not limit them."""
    limit = int(trainer.get("max_steps") or -1)
    if limit < 0 and collection is not None and trainer.get("max_epochs"):
        batches = collection.passes * (collection.rows // collection.minibatch)
        return int(trainer.get("max_epochs")) * -(-batches // accumulate)
    return limit
