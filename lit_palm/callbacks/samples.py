"""Show what the model writes: samples with their rewards as text in TensorBoard, after every validation.

The module leaves its latest samples in `pl_module.samples`, a list of dictionaries with `prompt`, `completion` and,
where there are rewards, `reward` (the weighted sum) and `rewards` (by name).
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["SampleLogger", "format_samples"]


class SampleLogger(Callback):
    """Log `pl_module.samples` as a table under one tag, to every logger that takes text (`experiment.add_text`).

    Args:
        num_samples: how many samples are shown.
        tag: name of the text in TensorBoard.
    """

    def __init__(self, num_samples: int = 8, tag: str = "samples") -> None:
        if num_samples < 1:
            raise ValueError(f"SampleLogger: num_samples is {num_samples}; it must be at least 1")
        self.num_samples = num_samples
        self.tag = tag

    @staticmethod
    def replaces() -> type[Callback]:
        """A callback of this type in the configuration takes the place of the default one."""
        return SampleLogger

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        samples = getattr(pl_module, "samples", None)
        if not samples or trainer.sanity_checking or not trainer.is_global_zero:
            return
        text = format_samples(samples[: self.num_samples])
        for logger in trainer.loggers:
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if add_text is not None:
                add_text(self.tag, text, global_step=trainer.global_step)


def format_samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table: prompt, completion and a column for every reward, the sum first.

    Text is escaped, so that what a model writes cannot break the table or pass for markup; a line break shows as such.
    """
    names = list(dict.fromkeys(name for sample in samples for name in _rewards(sample)))
    lines = ["| " + " | ".join(["prompt", "completion", *map(_escape, names)]) + " |"]
    lines.append("|" + " --- |" * 2 + " ---: |" * len(names))
    for sample in samples:
        rewards = _rewards(sample)
        numbers = [f"{rewards[name]:.3f}" if name in rewards else "" for name in names]
        lines.append("| " + " | ".join([_escape(sample["prompt"]), _escape(sample["completion"]), *numbers]) + " |")
    return "\n".join(lines)


def _rewards(sample: Mapping[str, Any]) -> dict[str, float]:
    """The sum, where there is one, then its parts by name."""
    parts = {name: float(value) for name, value in (sample.get("rewards") or {}).items()}
    total = sample.get("reward")
    return parts if total is None else {"reward": float(total), **parts}


def _escape(text: str) -> str:
    escaped = html.escape(text, quote=False).replace("\r\n", "\n").replace("\r", "\n").replace("\n", "<br>")
    for character in "\\`*_|[]":
        escaped = escaped.replace(character, f"&#{ord(character)};")
    return escaped
