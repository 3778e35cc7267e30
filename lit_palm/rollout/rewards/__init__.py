"""Rewards: what a completion is worth. Rules, reward models, Python functions, or a weighted sum of several.

A reward gets the whole batch, as text and as token ids, together with every other column of the prompt data (such as
`answer`), and returns one number for each completion:

    def exact(completions: list[str], answer: list[str], **columns) -> list[float]:
        return [float(text.strip() == right) for text, right in zip(completions, answer)]

    rewards = [PythonReward("my_rewards.exact"), RewardModel("reward.ckpt", weight=0.5), LengthPenalty(max_length=200)]
    scores_B, values = total_reward(rewards, batch)

| reward              | what it says                                                                    |
|---------------------|---------------------------------------------------------------------------------|
| `RewardModel`       | what a learned reward model says                                                |
| `SequenceClassifier`| what a classifier of `transformers` with a tokeniser of its own says            |
| `PythonReward`      | what your own function says                                                     |
| `RegexReward`       | whether, or how often, a pattern is found                                       |
| `ExactMatch`        | whether the completion is the answer in a column of the data                    |
| `NumericMatch`      | whether its number is                                                           |
| `GSM8KAnswer`       | the same by the rules of GSM8K: behind "####", boxed, or the last one           |
| `LengthPenalty`     | how far it is too short or too long, below zero                                 |
| `RepetitionPenalty` | how much of it repeats itself, below zero                                       |
| `Ensemble`          | the mean, the minimum or a lower bound of several                               |

Rewards know no devices and no checkpoints: the host passes `build` a loader, keeps the network where it computes and
sets `reward.network`. Entry-point group `lit_palm.rewards`.
"""

from lit_palm.rollout.rewards.answers import ExactMatch
from lit_palm.rollout.rewards.base import NetworkLoader, Reward, RewardBatch, every_reward
from lit_palm.rollout.rewards.classifier import SequenceClassifier
from lit_palm.rollout.rewards.ensemble import Ensemble
from lit_palm.rollout.rewards.function import PythonReward
from lit_palm.rollout.rewards.gsm8k import GSM8KAnswer
from lit_palm.rollout.rewards.model import RewardModel
from lit_palm.rollout.rewards.numeric import NumericMatch
from lit_palm.rollout.rewards.penalties import LengthPenalty, RepetitionPenalty
from lit_palm.rollout.rewards.regex import RegexReward
from lit_palm.rollout.rewards.total import reward_totals, total_reward

__all__ = [
    "Ensemble",
    "GSM8KAnswer",
    "ExactMatch",
    "LengthPenalty",
    "NetworkLoader",
    "NumericMatch",
    "PythonReward",
    "RegexReward",
    "RepetitionPenalty",
    "Reward",
    "RewardBatch",
    "RewardModel",
    "SequenceClassifier",
    "every_reward",
    "reward_totals",
    "total_reward",
]
