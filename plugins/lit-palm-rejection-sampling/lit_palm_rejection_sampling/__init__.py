"""Rejection sampling for lit_palm: sample, keep what is good, fine-tune on it, again.

lit-palm fit --config configs/rejection-sampling.yaml
"""

from lit_palm_rejection_sampling.objective import RAFT, RFT, RejectionSampling

__all__ = ["RAFT", "RFT", "RejectionSampling"]
