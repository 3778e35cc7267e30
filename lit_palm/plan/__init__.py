"""`lit-palm plan`: what a run needs, how long it takes and what it costs, before anything is rented.

    lit-palm plan --config configs/ppo.yaml --network 8b --device a100-80gb --devices 64 [--tokens 300e9] [--json]
    lit-palm plan --config configs/pretrain.yaml --config configs/palm/8b.yaml --vocab_size 256000 --dry-run ...

Reading order: job.py (a run as numbers) <- reading.py (from YAML) -> passes.py (memory over time, with activations.py
and optimizers.py) and speed.py -> planning.py (fits? what to change?) -> report.py. tracker.py and dry_run.py trace the
real networks on fake tensors instead.
"""

from lit_palm.plan.command import main

__all__ = ["main"]
