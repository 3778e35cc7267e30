"""Readers of published datasets: rows as the hub serves them, made into what the data modules take.

    lit-palm fit --config configs/reward.yaml --data.reader=OASST --data.reader.lang=[en]
    lit-palm fit --config configs/reward.yaml --data.reader=OASST --data.train=2023-04-12_oasst_ready.trees.jsonl.gz

| reader                   | dataset on the hub                              | demonstrations | preferences |
|--------------------------|-------------------------------------------------|----------------|-------------|
| `HHRLHF`                 | Anthropic/hh-rlhf                               | chosen         | pairs       |
| `OASST`                  | OpenAssistant/oasst1, oasst2                    | threads        | rankings    |
| `SHP`                    | stanfordnlp/SHP                                 | preferred      | pairs       |
| `UltraFeedback`          | openbmb/UltraFeedback                           | best           | rankings    |
| `UltraFeedbackBinarized` | HuggingFaceH4/ultrafeedback_binarized           | its own        | pairs       |
| `HelpSteer`              | nvidia/HelpSteer                                | best           | rankings, ratings |
| `HelpSteer2`             | nvidia/HelpSteer2                               | best           | rankings, ratings |
| `HelpSteer2Preference`   | nvidia/HelpSteer2, preference                   | preferred      | pairs       |
| `HelpSteer3`             | nvidia/HelpSteer3, preference                   | preferred      | pairs       |
| `SummarizeFromFeedback`  | openai/summarize_from_feedback                  | none           | pairs, ratings |
| `TLDR`                   | vwxyzjn/summarize_from_feedback_tldr_3_filtered | its own        | none        |
| `Alpaca`                 | tatsu-lab/alpaca                                | its own        | none        |
| `ShareGPT`               | anon8231489123/ShareGPT_Vicuna_unfiltered       | its own        | none        |
| `GSM8K`                  | openai/gsm8k                                    | its own        | none        |

All of them give prompts too.
A reader of your own subclasses `Reader`, see base.py; the command line takes its dotted name.
"""

from lit_palm.data.readers.base import Drop, Reader, View
from lit_palm.data.readers.gsm8k import GSM8K
from lit_palm.data.readers.helpsteer import HelpSteer, HelpSteer2, HelpSteer2Preference, HelpSteer3
from lit_palm.data.readers.hh import HHRLHF
from lit_palm.data.readers.instructions import Alpaca, ShareGPT
from lit_palm.data.readers.oasst import OASST
from lit_palm.data.readers.places import Hub
from lit_palm.data.readers.shp import SHP
from lit_palm.data.readers.summaries import TLDR, SummarizeFromFeedback
from lit_palm.data.readers.ultrafeedback import UltraFeedback, UltraFeedbackBinarized

__all__ = [
    "GSM8K",
    "HHRLHF",
    "OASST",
    "SHP",
    "TLDR",
    "Alpaca",
    "Drop",
    "HelpSteer",
    "HelpSteer2",
    "HelpSteer2Preference",
    "HelpSteer3",
    "Hub",
    "Reader",
    "ShareGPT",
    "SummarizeFromFeedback",
    "UltraFeedback",
    "UltraFeedbackBinarized",
    "View",
]
