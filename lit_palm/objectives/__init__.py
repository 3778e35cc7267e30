"""What to optimise: pure functions of tensors (see `base` for the contract)."""

from lit_palm.objectives.base import Objective
from lit_palm.objectives.language_modeling import LanguageModeling
from lit_palm.objectives.ppo import PPO
from lit_palm.objectives.reward_ranking import RewardRanking, RewardRegression

__all__ = ["PPO", "LanguageModeling", "Objective", "RewardRanking", "RewardRegression"]
