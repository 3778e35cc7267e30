"""The LightningModules: the only room that knows devices, gradients, ranks and checkpoints."""

from lit_palm.models.lora import LoRA
from lit_palm.modules.checkpoint import read_checkpoint
from lit_palm.modules.host import LitModule
from lit_palm.modules.language_model import LitLanguageModel
from lit_palm.modules.policy import LitPolicy
from lit_palm.modules.reference import ReferenceUpdate
from lit_palm.modules.reward_model import LitRewardModel
from lit_palm.modules.sharding import Sharding
from lit_palm.modules.weights import load_network

__all__ = [
    "LitLanguageModel",
    "LitModule",
    "LitPolicy",
    "LitRewardModel",
    "LoRA",
    "ReferenceUpdate",
    "Sharding",
    "load_network",
    "read_checkpoint",
]
