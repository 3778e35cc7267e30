"""Objectives that learn from preferences without a reward model, for `lit-palm fit --model.objective=DPO`.

Each class is an entry point of the group `lit_palm.objectives`: `DPO` (with all its losses) and `OnlineDPO` need a
reference, `SimPO`, `ORPO` and `CPO` do without, and `KTO` learns from single answers that people wanted or not.
"""

from lit_palm_dpo.dpo import DPO
from lit_palm_dpo.kto import KTO
from lit_palm_dpo.online import OnlineDPO
from lit_palm_dpo.reference_free import CPO, ORPO, SimPO

__all__ = ["CPO", "DPO", "KTO", "ORPO", "OnlineDPO", "SimPO"]
