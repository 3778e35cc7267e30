"""Networks: pure torch, no Lightning. `base` has the interface, `palm` the network, `logprobs` its loss-side head."""

from lit_palm.models.base import Cache, Head, Network, NetworkConfig, ScalarNetwork
from lit_palm.models.logprobs import TokenLogProbs
from lit_palm.models.palm import PaLM, PaLMConfig

__all__ = ["Cache", "Head", "Network", "NetworkConfig", "PaLM", "PaLMConfig", "ScalarNetwork", "TokenLogProbs"]
