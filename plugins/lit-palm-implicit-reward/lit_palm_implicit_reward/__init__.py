"""Implicit process rewards for lit_palm: a language model that knows, from outcomes alone, what every token was worth.

lit-palm fit --config plugins/lit-palm-implicit-reward/configs/implicit-prm.yaml
"""

from lit_palm_implicit_reward.objective import ImplicitPRM
from lit_palm_implicit_reward.reward import ImplicitProcessReward

__all__ = ["ImplicitPRM", "ImplicitProcessReward"]
