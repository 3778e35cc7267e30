"""The demo: from human ratings to an aligned policy on a laptop, and a table that says whether it worked.

    python -m lit_palm.demo data        # fetch the ratings, split them, write the jsonl files that the YAML files name
    python -m lit_palm.demo judge       # fit the independent judge, measure it and VADER on held-out pairs
    python -m lit_palm.demo control     # keep one sample of each prompt at random, to fine-tune on as a control
    python -m lit_palm.demo report      # the table, on the terminal and as JSON
    python -m lit_palm.demo addition    # data of the second recipe: one-digit addition, a reward that can be verified

The training itself is ordinary `lit-palm fit` with the YAML files of configs/demo. Nothing in the framework imports
this package.
"""
