"""Policy gradients whose baseline is other completions rather than a value network: GRPO and its relatives.

Each name is an objective of its own, found by lit_palm through its entry point: `--model.objective=DAPO`. From Python:

    from lit_palm_grpo import GRPO
    LitPolicy("finetuned.ckpt", objective=GRPO(kl_coef=0.1), ...)
"""

from lit_palm_grpo.grpo import GRPO
from lit_palm_grpo.matching import TPO, FlowRL
from lit_palm_grpo.variants import CISPO, DAPO, GSPO, RLOO, DrGRPO, ReinforcePlusPlus

__all__ = ["CISPO", "DAPO", "GRPO", "GSPO", "RLOO", "TPO", "DrGRPO", "FlowRL", "ReinforcePlusPlus"]
