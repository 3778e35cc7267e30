"""lit_palm: the ChatGPT recipe (pre-train, fine-tune, reward model, PPO) as a modular PyTorch Lightning framework.

    from lightning.pytorch import Trainer
    from lit_palm import LitLanguageModel, PaLMConfig, TextData

    Trainer(max_epochs=1).fit(LitLanguageModel(PaLMConfig(d_model=128)), TextData(train="text.txt", tokenizer="bytes"))

Names are imported on first use, so that `import lit_palm` costs nothing. `__init__.pyi` tells type checkers of them.
"""

from __future__ import annotations

import importlib
from typing import Any

from lit_palm.version import __version__

_HOMES = {
    "Experience": "lit_palm.types",
    "Loss": "lit_palm.types",
    "Output": "lit_palm.types",
    "Network": "lit_palm.models.base",
    "NetworkConfig": "lit_palm.models.base",
    "ScalarNetwork": "lit_palm.models.base",
    "PaLM": "lit_palm.models.palm",
    "PaLMConfig": "lit_palm.models.palm",
    "HuggingFaceConfig": "lit_palm.models.huggingface_config",
    "LoRA": "lit_palm.models.lora",
    "Objective": "lit_palm.objectives",
    "LanguageModeling": "lit_palm.objectives",
    "RewardRanking": "lit_palm.objectives",
    "RewardRegression": "lit_palm.objectives",
    "PPO": "lit_palm.objectives",
    "Engine": "lit_palm.rollout.engine",
    "CachedEngine": "lit_palm.rollout.engine",
    "ContinuousEngine": "lit_palm.rollout.continuous_engine",
    "Generation": "lit_palm.rollout.engine",
    "Sampling": "lit_palm.rollout.sampling",
    "RolloutConfig": "lit_palm.rollout.collector",
    "RolloutLoader": "lit_palm.rollout.loader",
    "Reward": "lit_palm.rollout.rewards",
    "RewardBatch": "lit_palm.rollout.rewards",
    "RewardModel": "lit_palm.rollout.rewards",
    "SequenceClassifier": "lit_palm.rollout.rewards",
    "PythonReward": "lit_palm.rollout.rewards",
    "RegexReward": "lit_palm.rollout.rewards",
    "ExactMatch": "lit_palm.rollout.rewards",
    "NumericMatch": "lit_palm.rollout.rewards",
    "GSM8KAnswer": "lit_palm.rollout.rewards",
    "LengthPenalty": "lit_palm.rollout.rewards",
    "RepetitionPenalty": "lit_palm.rollout.rewards",
    "Ensemble": "lit_palm.rollout.rewards",
    "Tokenizer": "lit_palm.data.tokenizers",
    "ByteTokenizer": "lit_palm.data.tokenizers",
    "BPETokenizer": "lit_palm.data.tokenizers",
    "HFTokenizer": "lit_palm.data.tokenizers",
    "load_tokenizer": "lit_palm.data.tokenizers",
    "TextData": "lit_palm.data.text",
    "StreamingTextData": "lit_palm.data.streaming",
    "TextSource": "lit_palm.data.stream_sources",
    "DemonstrationData": "lit_palm.data.demonstrations",
    "PreferenceData": "lit_palm.data.preferences",
    "PromptData": "lit_palm.data.prompts",
    "Reader": "lit_palm.data.readers",
    "LitLanguageModel": "lit_palm.modules",
    "LitRewardModel": "lit_palm.modules",
    "LitPolicy": "lit_palm.modules",
    "ReferenceUpdate": "lit_palm.modules",
    "load_network": "lit_palm.modules",
    "read_checkpoint": "lit_palm.modules",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lit_palm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
