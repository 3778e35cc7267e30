"""What a plugin is and which there are: entry points found from metadata alone, nothing is imported."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

__all__ = ["BUILTINS", "GROUPS", "Plugin", "PluginError", "allowed_names", "discover", "group_of", "is_builtin"]

GROUPS = {
    "lit_palm.objectives": ("objective", "lit_palm.objectives.base:Objective"),
    "lit_palm.rewards": ("reward", "lit_palm.rollout.rewards:Reward"),
    "lit_palm.networks": ("network", "lit_palm.models.base:NetworkConfig"),
    "lit_palm.engines": ("engine", "lit_palm.rollout.engine:Engine"),
}
"""Entry-point group -> (kind, the abstract class its members extend)."""

BUILTINS = {
    "lit_palm.objectives": {
        "LanguageModeling": "lit_palm.objectives.language_modeling:LanguageModeling",
        "RewardRanking": "lit_palm.objectives.reward_ranking:RewardRanking",
        "RewardRegression": "lit_palm.objectives.reward_ranking:RewardRegression",
        "PPO": "lit_palm.objectives.ppo:PPO",
    },
    "lit_palm.rewards": {
        "RewardModel": "lit_palm.rollout.rewards.model:RewardModel",
        "PythonReward": "lit_palm.rollout.rewards.function:PythonReward",
        "RegexReward": "lit_palm.rollout.rewards.regex:RegexReward",
        "ExactMatch": "lit_palm.rollout.rewards.answers:ExactMatch",
        "NumericMatch": "lit_palm.rollout.rewards.numeric:NumericMatch",
        "GSM8KAnswer": "lit_palm.rollout.rewards.gsm8k:GSM8KAnswer",
        "LengthPenalty": "lit_palm.rollout.rewards.penalties:LengthPenalty",
        "RepetitionPenalty": "lit_palm.rollout.rewards.penalties:RepetitionPenalty",
        "SequenceClassifier": "lit_palm.rollout.rewards.classifier:SequenceClassifier",
        "Ensemble": "lit_palm.rollout.rewards.ensemble:Ensemble",
    },
    "lit_palm.networks": {
        "PaLMConfig": "lit_palm.models.palm:PaLMConfig",
        "HuggingFaceConfig": "lit_palm.models.huggingface_config:HuggingFaceConfig",
    },
    "lit_palm.engines": {
        "CachedEngine": "lit_palm.rollout.engine:CachedEngine",
        "ContinuousEngine": "lit_palm.rollout.continuous_engine:ContinuousEngine",
        "RemoteEngine": "lit_palm.rollout.remote:RemoteEngine",
    },
}
"""What lit_palm brings itself; a test compares it with the concrete classes that exist."""


class PluginError(ValueError):
    """A plugin that was asked for cannot be used; the message names it, its distribution and the way out."""


@dataclass
class Plugin:
    """One entry point, or one built-in.

    Args:
        name: the entry point's name, which is the class's name.
        kind: "objective", "reward", "network" or "engine".
        distribution: the installed distribution that brings it.
        version: that distribution's version.
        api: the `API_VERSION` that it states; None until it is imported, or when it states none.
        health: "unchecked" (not imported yet), "healthy", "broken" (does not import), "refused" (imports, but breaks
            the rules), "duplicate" (several distributions bring this name) or "off" (left out by LIT_PALM_PLUGINS).
        cause: why it is not healthy.
        group: the entry-point group.
        value: "module:Class".
    """

    name: str
    kind: str
    distribution: str
    version: str
    api: int | None
    health: str
    cause: str | None
    group: str
    value: str

    @property
    def source(self) -> str:
        """Distribution and version, for messages."""
        return f"{self.distribution} {self.version}"

    def problem(self) -> str:
        """What is wrong with it, on one line."""
        if self.health == "duplicate":
            return f"{self.kind} {self.cause}"
        return f"plugin {self.name} ({self.kind}, from {self.source}) is {self.health}: {self.cause}"


@functools.cache
def discover() -> tuple[Plugin, ...]:
    """All built-ins and entry points of this environment, found without importing any; cached for the process."""
    try:
        version = metadata.version("lit_palm")
    except metadata.PackageNotFoundError:
        version = "(source tree)"
    found = [
        Plugin(name, GROUPS[group][0], "lit_palm", version, None, "unchecked", None, group, value)
        for group, members in BUILTINS.items()
        for name, value in members.items()
    ]
    builtin_values = {(plugin.group, plugin.value) for plugin in found}
    seen: set[str] = set()
    for distribution in metadata.distributions():
        if "lit_palm." not in _entry_points_text(distribution):
            continue
        name, version = _identity(distribution)
        # An editable install can be on the path twice, as .egg-info and .dist-info; the first one counts, as in pip.
        normalised = re.sub(r"[-_.]+", "-", name).lower()
        if normalised in seen:
            continue
        seen.add(normalised)
        found += [p for p in _entries(distribution, name, version) if (p.group, p.value) not in builtin_values]
    _mark_off(found)
    _mark_duplicates(found)
    return tuple(found)


def _entry_points_text(distribution: metadata.Distribution) -> str:
    try:
        return distribution.read_text("entry_points.txt") or ""
    except UnicodeDecodeError:  # somebody else's damaged file
        return ""


def _identity(distribution: metadata.Distribution) -> tuple[str, str]:
    """Name and version of a distribution whose metadata may be damaged."""
    try:
        return distribution.metadata["Name"] or "unknown", distribution.metadata["Version"] or "unknown"
    except Exception:  # whatever damaged metadata raises, the plugin is still listed
        return "unknown", "unknown"


def _entries(distribution: metadata.Distribution, name: str, version: str) -> list[Plugin]:
    try:
        points = [point for point in distribution.entry_points if point.group in GROUPS]
    except Exception as error:  # one unreadable entry_points.txt must not hide everybody else's
        cause = f"entry_points.txt cannot be read ({type(error).__name__}: {error}); reinstall {name}"
        return [Plugin("?", "?", name, version, None, "broken", cause, "?", "?")]
    return [
        Plugin(point.name, GROUPS[point.group][0], name, version, None, "unchecked", None, point.group, point.value)
        for point in points
    ]


def allowed_names() -> set[str] | None:
    """The names in LIT_PALM_PLUGINS; None when it is not set."""
    value = os.environ.get("LIT_PALM_PLUGINS")
    return None if value is None else {name.strip() for name in value.split(",") if name.strip()}


def _mark_off(found: Sequence[Plugin]) -> None:
    allowed = allowed_names()
    for plugin in found:
        if allowed is not None and not is_builtin(plugin) and plugin.name not in allowed:
            plugin.health, plugin.cause = "off", "LIT_PALM_PLUGINS does not name it"


def _mark_duplicates(found: Sequence[Plugin]) -> None:
    by_name: dict[tuple[str, str], list[Plugin]] = {}
    for plugin in found:
        if plugin.health == "unchecked":
            by_name.setdefault((plugin.group, plugin.name), []).append(plugin)
    for same in by_name.values():
        if len(same) == 1:
            continue
        where = " and ".join(f"{plugin.source} ({plugin.value})" for plugin in same)
        builtin = any(map(is_builtin, same))
        shadows = ", which shadows a built-in" if builtin else ""
        for plugin in same:
            if not is_builtin(plugin):
                plugin.health = "duplicate"
            way_out = "uninstall the plugin, or leave it" if builtin else "uninstall one of them, or leave both"
            plugin.cause = f"{plugin.name} is brought by both {where}{shadows}: {way_out} out of LIT_PALM_PLUGINS"


def is_builtin(plugin: Plugin) -> bool:
    """Whether it comes with lit_palm itself."""
    return BUILTINS.get(plugin.group, {}).get(plugin.name) == plugin.value


def group_of(group: str) -> str:
    """The entry-point group for a group or a kind."""
    for name, (kind, _) in GROUPS.items():
        if group in (name, kind):
            return name
    raise ValueError(f"no plugin group {group!r}; there are {', '.join(GROUPS)}")
