"""Implicit language Q-learning for lit_palm: learn values from rated completions, and decode by them.

lit-palm fit --config plugins/lit-palm-ilql/configs/ilql.yaml
"""

from lit_palm_ilql.network import ILQLConfig, ILQLNetwork
from lit_palm_ilql.objective import ILQL

__all__ = ["ILQL", "ILQLConfig", "ILQLNetwork"]
