"""The model card: what the network is, how to run it, and what it was trained with, as its checkpoint says."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["adapter_card", "model_card"]

_KINDS = {
    "language_model": "a language model, trained on text or demonstrations",
    "reward_model": "a reward model, trained on human preferences",
    "policy": "a policy, aligned by reinforcement learning or from preferences",
}

_GENERATE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```"""

_GENERIC_REWARD = """\
Its class is transformers' generic sequence classifier over the architecture's trunk, which two lines name:

```python
from transformers import AutoTokenizer
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.{kind}.modeling_{kind} import {stem}PreTrainedModel

class {stem}ForSequenceClassification(GenericForSequenceClassification, {stem}PreTrainedModel): ...

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {stem}ForSequenceClassification.from_pretrained("{name}")
score = model(**tokenizer("a text to be judged", return_tensors="pt")).logits[0, 0]
```"""

_REWARD = """\
```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForSequenceClassification.from_pretrained("{name}")
score = model(**tokenizer("a text to be judged", return_tensors="pt")).logits[0, 0]
```"""


def model_card(header: dict[str, Any], architecture: dict[str, Any], name: str, num_parameters: int) -> str:
    """The text of `README.md`.

    Args:
        header: of the checkpoint.
        architecture: the `config.json` that was written.
        name: of the folder or repository.
        num_parameters: of the network.
    """
    import transformers

    kind = architecture["architectures"][0]
    scalar = kind.endswith("ForSequenceClassification")
    tags = ["lit-palm", "rlhf", architecture["model_type"], *(["reward-model"] if scalar else [])]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if scalar else "text-generation",
        "tags": tags,
    }
    own = architecture.get("lit_palm") or {}
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"{num_parameters:,} parameters, {_KINDS.get(header.get('kind', ''), 'a network')}. Layout: `{kind}` of "
        "transformers. Written by `lit-palm export`.\n",
    ]
    if not scalar:
        template = _GENERATE
    else:
        template = _REWARD if hasattr(transformers, kind) else _GENERIC_REWARD
    stem = kind.removesuffix("ForSequenceClassification")
    lines.append(template.format(name=name, stem=stem, kind=architecture["model_type"]) + "\n")
    if own.get("score_bias"):
        lines.append(
            f"A score here is that of the checkpoint less the constant {own['score_bias']:.6g}, because this layout "
            "has no bias (`lit_palm.score_bias` in config.json). Comparisons are the same.\n"
        )
    return "\n".join([*lines, *_training(header)]) + "\n"


def adapter_card(header: dict[str, Any], name: str, base: str | None, scalar: bool, bias: float) -> str:
    """The text of `README.md` of an adapter.

    Args:
        header: of the checkpoint.
        name: of the folder or repository.
        base: folder or hub name of the frozen network; None: not known.
        scalar: it is a reward model's.
        bias: the constant that a reward model's score leaves out.
    """
    front: dict[str, Any] = {"library_name": "peft", "tags": ["lit-palm", "rlhf", "lora"]}
    if base is not None:
        front["base_model"] = base
    kind = "AutoPeftModelForSequenceClassification" if scalar else "AutoPeftModelForCausalLM"
    labels = ", num_labels=1" if scalar else ""
    known = base or "the base model, exported beside it by `lit-palm export`"
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}\n",
        f"A LoRA adapter on {known}: {_KINDS.get(header.get('kind', ''), 'a network')}. Written by `lit-palm export`."
        "\n",
        f'```python\nfrom peft import {kind}\n\nmodel = {kind}.from_pretrained("{name}"{labels})\n```\n',
    ]
    if bias:
        lines.append(
            f"A score here is that of the checkpoint less the constant {bias:.6g}; comparisons are the same.\n"
        )
    return "\n".join([*lines, *_training(header)]) + "\n"


def _training(header: dict[str, Any]) -> list[str]:
    lines = ["## Training\n", *(f"- {label}: {text}" for label, text in _facts(header).items())]
    config = header.get("config")
    if config:
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True, default_flow_style=False)
        lines.append(f"\nThe whole configuration:\n\n```yaml\n{text}```")
    return lines


def _facts(header: dict[str, Any]) -> dict[str, str]:
    """What the header says, by label."""
    facts: dict[str, str] = {}
    if header.get("num_tokens"):
        facts["tokens trained on in the last stage"] = f"{int(header['num_tokens']):,}"
    objective = (header.get("objective") or {}).get("class_path")
    if objective:
        facts["objective"] = f"`{objective}`"
    data = (header.get("data") or {}).get("class_path")
    if data:
        facts["data"] = f"`{data}`"
    optimizer = (header.get("optimizer") or {}).get("class_path")
    if optimizer:
        facts["optimiser"] = f"`{optimizer}`"
    world = header.get("world")
    if world:
        facts["strategy"] = f"{world.get('strategy')}, {world.get('ranks')} process(es)"
    versions = header.get("versions") or {"lit_palm": header.get("version")}
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    if header.get("imported"):
        facts["imported from"] = str(header["imported"].get("from"))
    return facts
