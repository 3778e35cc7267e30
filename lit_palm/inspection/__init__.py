"""`lit-palm data inspect`: what a run would train on, before it does.

    lit-palm data inspect --config configs/finetune.yaml --data.train=my_demonstrations.jsonl
    lit-palm data inspect OASST 2023-04-12_oasst_ready.trees.jsonl.gz --view prompts --data.tokenizer=bytes

command.py reads the command line, measuring.py counts and measures, showing.py prints.
"""

from lit_palm.inspection.command import main

__all__ = ["main"]
