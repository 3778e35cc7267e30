"""Checkpoints of palm-rlhf-pytorch (https://github.com/lucidrains/PaLM-rlhf-pytorch): its PaLM, LoRA scopes, rewards.

Such a checkpoint is a state dict and nothing else, so what it does not say is worked out or asked for:
- sizes come from shapes. The fused projection has rows q (heads * dh), k (dh), v (dh), two halves of the feed-forward,
  the second of which is the gate;
- a norm's weight is `gamma` until version 0.2.3 and `gamma + 1` since 0.2.4. A file loads into either and is wrong in
  one. `gamma_convention` tells them apart by the numbers, and what it cannot tell has to be said;
- xPos leaves no trace: a causal PaLM of theirs always has it (`xpos_scale_base` 512 by default).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_palm.foreign.network import ForeignNetwork, Recipe, Weights, check_floating, is_nonzero
from lit_palm.foreign.palm_rlhf_lora import adapter, merged, scopes
from lit_palm.foreign.palm_rlhf_reward import scalar_head
from lit_palm.foreign.tensors import Tensors
from lit_palm.models.palm import PaLMConfig

__all__ = ["CONCEPTOFMIND", "PaLMRLHFOptions", "gamma_convention", "is_palm_rlhf", "read_palm_rlhf"]

CONCEPTOFMIND = {
    "conceptofmind-150m": (768, 12),
    "conceptofmind-410m": (1024, 24),
    "conceptofmind-1b": (2048, 16),
    "conceptofmind-2b": (2560, 24),
}
"""Width and blocks of the four sizes of https://github.com/conceptofmind/PaLM: 8 heads of 128, 50,304 ids of
GPT-NeoX-20B's tokeniser, 8,192 tokens, xPos, old gammas."""
CONCEPTOFMIND_VOCABULARY, CONCEPTOFMIND_LENGTH = 50_304, 8192

_FF_OUT = re.compile(r"ff_out\.\d+\.weight")
# buffers that say nothing that the shapes do not, and masks that some versions saved
_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.scale", "pos_emb", "pos_emb_scale", "mask")
_LEFT_OUT = ("critic.", "critic_palm.", "value_head.", "reward_model.")


@dataclass
class PaLMRLHFOptions:
    """What a state dict does not say."""

    gamma: Literal["auto", "plain", "plus_one"] = "auto"
    """The norms' convention: plain until version 0.2.3, plus_one since 0.2.4; auto tells by the numbers."""
    trust_gamma: bool = False
    """Take the convention that `gamma` names even where the numbers speak against it."""
    scope: str | None = None
    """The LoRA scope to merge into the weights; `none` leaves all of them out."""
    keep_lora: bool = False
    """Keep the scope apart as a PEFT adapter instead of merging it."""
    xpos: bool = True
    """Whether attention decays with distance; palm-rlhf-pytorch's causal PaLM always does."""
    xpos_scale_base: int = 512
    """Its `rotary_xpos_scale_base`."""
    max_length: int | None = None
    """Longest sequence in tokens; None: 8192 for a size of conceptofmind's, else 2048."""
    segments: Literal["refuse", "ignore"] = "refuse"
    """For a reward model whose embeddings of prompt and response differ: `ignore` imports the scores that it gives
    without a prompt mask."""


def is_palm_rlhf(tensors: Tensors) -> bool:
    """Whether these are weights of palm-rlhf-pytorch."""
    return any(name.endswith("fused_attn_ff_proj.weight") for name in tensors)


def read_palm_rlhf(tensors: Tensors, options: PaLMRLHFOptions, preset: str | None = None) -> ForeignNetwork:
    """Read a PaLM or a reward model.

    Args:
        tensors: the checkpoint.
        options: what it does not say.
        preset: a size of conceptofmind's that it must have.

    Raises:
        ValueError: it is something else, misses weights, cannot be expressed here, or the norms' convention is unclear
            or contradicted.
    """
    where, notes = tensors.where, []
    tensors, rest, reward = _without_wrappers(tensors)
    check_floating(tensors)
    if rest:
        notes.append(f"left out {', '.join(rest)}: a policy is what is imported")
    config, ff_out = _config(tensors, options)
    size = _conceptofmind(config)
    if preset is not None and preset != size:
        width, depth = CONCEPTOFMIND[preset]
        raise ValueError(
            f"{where}: is not {preset}, which is {width} wide with {depth} blocks, 8 heads of 128 and "
            f"{CONCEPTOFMIND_VOCABULARY} ids: it is {config.d_model} wide with {config.num_layers} blocks, "
            f"{config.num_heads} heads of {config.head_dim} and {config.vocab_size} ids"
        )
    if size is not None:
        notes.append(f"has the shape of {size}")
    config.max_length = options.max_length or (CONCEPTOFMIND_LENGTH if size else 2048)
    if options.max_length is None and size is None:
        notes.append(f"max_length is set to {config.max_length}: the file does not say; --max_length sets another")
    found, numbers = gamma_convention(tensors, [name for name in tensors if name.endswith("norm.gamma")])
    plus = _decide_gamma(where, options, found, numbers, notes)
    known = scopes(tensors)
    scope = _decide_scope(where, options, known, reward, notes)
    recipes = _language_model(tensors, config, ff_out, plus)
    result = ForeignNetwork(where, config, Weights(recipes), notes=notes)
    if scope is not None and options.keep_lora:
        result.adapters[scope] = adapter(tensors, config, scope)
        notes.append(f"kept LoRA scope {scope} as an adapter")
    elif scope is not None:
        recipes |= merged(tensors, config, scope, recipes)
        notes.append(f"merged LoRA scope {scope}")
    if reward:
        scalar_head(tensors, options.segments == "ignore", result)
    _check_all_used(tensors, config, ff_out, known, reward)
    return result


def gamma_convention(tensors: Tensors, names: Iterable[str]) -> tuple[str | None, str]:
    """Which convention the norms' gammas look like.

    Fresh ones are 1 in the old convention and 0 in the new one. Training moves them, as a rule so that the weight stays
    positive: old gammas are then positive, new ones of both signs, above -1. So gammas that are nearer to 1, twice
    over, are old; those that are nearer to 0 are new if many are negative or they have hardly moved. Positive gammas of
    about 0.3 may be weights of 0.3 or of 1.3, and nobody can tell.

    Args:
        tensors: has them.
        names: of the gammas.

    Returns:
        "plain", "plus_one", or None when it cannot be told; and the numbers that say so.
    """
    gammas = torch.cat([tensors[name].reshape(-1).double() for name in names])
    to_one, to_zero = (gammas - 1).abs().mean().item(), gammas.abs().mean().item()
    negative = (gammas < 0).double().mean().item()
    numbers = f"{to_one:.3g} away from 1 and {to_zero:.3g} away from 0 on average, {negative:.0%} negative"
    if 2 * to_one <= to_zero and negative < 0.1:
        return "plain", numbers
    new = 2 * to_zero <= to_one and (negative > 0.1 or to_zero < 0.05)
    return "plus_one" if new else None, numbers


def _decide_gamma(where: str, options: PaLMRLHFOptions, found: str | None, numbers: str, notes: list[str]) -> float:
    """What is added to a gamma."""
    if options.gamma == "auto":
        if found is None:
            raise ValueError(
                f"{where}: cannot tell whether a norm's weight is gamma or gamma + 1, the gammas are {numbers}: say "
                "--gamma plain for a file of palm-rlhf-pytorch until 0.2.3, --gamma plus_one since 0.2.4"
            )
        notes.append(f"norm weights are {'gamma' if found == 'plain' else 'gamma + 1'}: gammas are {numbers}")
    elif found not in (None, options.gamma):
        if not options.trust_gamma:
            raise ValueError(
                f"{where}: --gamma {options.gamma} contradicts the file, whose gammas are {numbers}: that is "
                f"--gamma {found}. If the file is as odd as that, add --trust_gamma true"
            )
        notes.append(f"WARNING: --gamma {options.gamma} against the numbers: gammas are {numbers}")
    return 0.0 if (found if options.gamma == "auto" else options.gamma) == "plain" else 1.0


def _decide_scope(
    where: str, options: PaLMRLHFOptions, known: Sequence[str], reward: bool, notes: list[str]
) -> str | None:
    if options.scope not in (None, "none", *known):
        there = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"{where}: has no LoRA scope {options.scope!r}; {there}")
    if options.scope == "none":
        return None
    if options.scope is not None or not known:
        if options.keep_lora and not known:
            raise ValueError(f"{where}: has no LoRA scopes, so --keep_lora has nothing to keep")
        return options.scope
    if reward and known == ["reward"]:
        notes.append("LoRA scope reward belongs to the reward model")
        return "reward"
    raise ValueError(
        f"{where}: has the LoRA scopes {', '.join(known)}: say --scope NAME to merge one (with --keep_lora true, to "
        "keep it as an adapter), or --scope none for the network without"
    )


def _without_wrappers(tensors: Tensors) -> tuple[Tensors, list[str], bool]:
    """The network's own names; what else is in the file and left out; and whether it is a reward model."""
    ends = [name.removesuffix("token_emb.weight") for name in tensors if name.endswith("token_emb.weight")]
    if not ends:  # safetensors keeps one of two names of a weight
        kept = {name: name.removesuffix("to_logits.weight") for name in tensors if name.endswith("to_logits.weight")}
        again = {name: name for name in tensors if name not in kept}
        tensors = tensors.renamed(again | {f"{prefix}token_emb.weight": name for name, prefix in kept.items()})
        ends = list(kept.values())
    if not ends:
        raise ValueError(f"{tensors.where}: has no token_emb.weight, so it is no PaLM of palm-rlhf-pytorch")
    if len(ends) > 1:  # an actor-critic, as its trainers save
        actors = [prefix for prefix in ends if prefix.endswith("actor_palm.")]
        if len(actors) != 1:
            raise ValueError(f"{tensors.where}: holds several networks ({', '.join(ends)}), none of which is the actor")
        ends = actors
    prefix = ends[0]
    outer = re.sub(r"(actor_)?palm\.$", "", prefix)  # what data parallelism and compilers put in front
    names: dict[str, str] = {}
    rest: dict[str, None] = {}
    for name in tensors:
        inner = name.removeprefix(outer)
        if name.startswith(prefix):
            names[name.removeprefix(prefix)] = name
        elif prefix != outer and inner.startswith(_LEFT_OUT):
            rest[inner.partition(".")[0]] = None
        else:
            names[inner] = name
    reward = any(name.startswith("to_pred.") for name in names)
    return tensors.renamed(names), list(rest), reward


def _config(tensors: Tensors, options: PaLMRLHFOptions) -> tuple[PaLMConfig, str]:
    """The configuration by the shapes, and the name of the feed-forward's output."""
    where = tensors.where
    ff_out = next((m[0] for name in tensors if (m := _FF_OUT.search(name))), None)
    for name in ("layers.0.fn.fused_attn_ff_proj.weight", "layers.0.fn.attn_out.weight", "norm.gamma"):
        if name not in tensors:
            raise ValueError(f"{where}: lacks {name}, so it is no whole PaLM of palm-rlhf-pytorch")
    if ff_out is None:
        raise ValueError(f"{where}: lacks layers.0.fn.ff_out.2.weight, so it is no whole PaLM of palm-rlhf-pytorch")
    vocab_size, d_model = tensors.shape("token_emb.weight")
    inner, d_ffn = tensors.shape("layers.0.fn.attn_out.weight")[1], tensors.shape(f"layers.0.fn.{ff_out}")[1]
    head_dim, odd = divmod(tensors.shape("layers.0.fn.fused_attn_ff_proj.weight")[0] - inner - 2 * d_ffn, 2)
    if odd or head_dim < 1 or inner % head_dim:
        raise ValueError(f"{where}: the shapes of layers.0 do not fit those of palm-rlhf-pytorch's block")
    config = PaLMConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        num_layers=1 + max(int(m[1]) for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))),
        num_heads=inner // head_dim,
        head_dim=head_dim,
        d_ffn=d_ffn,
        xpos=options.xpos,
        xpos_scale_base=options.xpos_scale_base,
        qk_norm="l2" if "layers.0.fn.q_scale" in tensors else "none",
        logit_scale=1.0,
    )
    config.rope_theta = _theta(tensors, config)
    return config, ff_out


def _theta(tensors: Tensors, config: PaLMConfig) -> float:
    """The base of the rotary wavelengths, which is checked against what the file says of them.

    Raises:
        ValueError: they are not RoPE's, or the decay is not xPos'.
    """
    place = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    stored = {kind: tensors.get(f"layers.0.fn.rotary_emb.{kind}") for kind in ("inv_freq", "scale")}
    theta, frequencies, decay = 10000.0, stored["inv_freq"], stored["scale"]
    if frequencies is not None and not _near(frequencies, theta**-place):
        if len(place) > 1:
            theta = float(frequencies[-1].double() ** (-1 / place[-1]))
        if not _near(frequencies, theta**-place):
            raise ValueError(f"{tensors.where}: layers.0.fn.rotary_emb.inv_freq are not RoPE's frequencies")
    if config.xpos and decay is not None and not _near(decay, (place + 0.4) / 1.4):
        raise ValueError(f"{tensors.where}: layers.0.fn.rotary_emb.scale is not xPos' decay")
    return theta


def _near(stored: Tensor, expected: Tensor) -> bool:
    # they may have been cast to bfloat16 with the network
    return torch.allclose(stored.double(), expected, rtol=1e-2, atol=0.0)


def _conceptofmind(config: PaLMConfig) -> str | None:
    """The name of the size, if it is one of conceptofmind's."""
    rest = (config.num_heads, config.head_dim, config.vocab_size, config.d_ffn, config.qk_norm)
    if rest != (8, 128, CONCEPTOFMIND_VOCABULARY, 4 * config.d_model, "none"):
        return None
    shape = (config.d_model, config.num_layers)
    return next((name for name, size in CONCEPTOFMIND.items() if size == shape), None)


def _language_model(tensors: Tensors, config: PaLMConfig, ff_out: str, plus: float) -> dict[str, Recipe]:
    """Our weights by name, made from theirs.

    Raises:
        ValueError: one is missing, has another shape, or cannot be expressed here.
    """
    heads = (config.num_heads + 2) * config.head_dim
    d_ffn, d_model = config.d_ffn or 0, config.d_model
    recipes: dict[str, Recipe] = {}

    def take(name: str, theirs: str, shape: tuple[int, ...], kind: str = "") -> None:
        if theirs not in tensors:
            raise ValueError(f"{tensors.where}: lacks {theirs}")
        if tensors.shape(theirs) != shape:
            raise ValueError(f"{tensors.where}: {theirs} has shape {tensors.shape(theirs)}, {shape} was expected")

        def make() -> Tensor:
            tensor = tensors[theirs]
            if kind == "gamma":
                return tensor + plus
            if kind == "fused":  # their gate is the second half, ours the first
                qkv, up, gate = tensor.split_with_sizes((heads, d_ffn, d_ffn))
                return torch.cat((qkv, gate, up))
            return tensor

        recipes[name] = Recipe(shape, tensors.dtype(theirs), make)

    take("embedding.weight", "token_emb.weight", (config.vocab_size or 0, d_model))
    take("norm.weight", "norm.gamma", (d_model,), "gamma")
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"layers.{i}.fn"
        take(f"{ours}.norm.weight", f"{theirs}.norm.gamma", (d_model,), "gamma")
        fused = (heads + 2 * d_ffn, d_model)
        take(f"{ours}.attn_ffn_in.weight", f"{theirs}.fused_attn_ff_proj.weight", fused, "fused")
        take(f"{ours}.attn_out.weight", f"{theirs}.attn_out.weight", (d_model, heads - 2 * config.head_dim))
        take(f"{ours}.ffn_out.weight", f"{theirs}.{ff_out}", (d_model, d_ffn))
        if config.qk_norm == "l2":
            for side in "qk":
                take(f"{ours}.{side}_norm.weight", f"{theirs}.{side}_scale", (config.head_dim,))
    if "to_logits.weight" in tensors and not torch.equal(tensors["to_logits.weight"], tensors["token_emb.weight"]):
        raise ValueError(
            f"{tensors.where}: to_logits.weight differs from token_emb.weight, and a PaLM has one weight for both"
        )
    biased = is_nonzero(tensors, [name for name in tensors if name.endswith("norm.beta")])
    if biased is not None:
        raise ValueError(f"{tensors.where}: {biased} is not zero, and a PaLM's norms have no bias")
    return recipes


def _check_all_used(tensors: Tensors, config: PaLMConfig, ff_out: str, known: Sequence[str], reward: bool) -> None:
    """Refuse what would be lost silently.

    Raises:
        ValueError: naming what this reader does not know.
    """
    block = {"norm.gamma", "norm.beta", "fused_attn_ff_proj.weight", "attn_out.weight", ff_out, *_BUFFERS}
    if config.qk_norm == "l2":
        block |= {"q_scale", "k_scale"}
    top = {"token_emb.weight", "to_logits.weight", "norm.gamma", "norm.beta"}
    top |= {"to_pred.0.weight", "prompt_embed", "response_embed"} if reward else set()
    unknown = [
        name
        for name in tensors
        if name not in top
        and not ((m := re.match(r"layers\.\d+\.fn\.(.*)", name)) and m[1] in block)
        and not any(name.startswith(f"finetune_modules.{scope}.") for scope in known)
    ]
    if unknown:
        names = f"{', '.join(unknown[:3])}{' ...' if len(unknown) > 3 else ''}"
        raise ValueError(f"{tensors.where}: has {names}, which palm-rlhf-pytorch's networks do not: it is another one")
