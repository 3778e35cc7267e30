"""The table that says whether it worked: measurements of every stage, their targets, PASS or MISS.

    python -m lit_palm.demo report --judge runs/demo/judge.safetensors \\
        --samples start=start.jsonl ppo=ppo.jsonl control=control.jsonl \\
        --metrics pretrain=pretrain.json finetune=finetune.json reward=reward.json --output runs/demo/report.json

Samples are JSON lines, one completion for each held-out prompt:

    {"prompt", "completion", "ended": bool, "num_tokens": int, "kl": float}

`num_tokens` counts the tokens of the completion, `kl` is log p(completion) under the policy that sampled it minus the
same under the reference, summed over its tokens, in nats; `start` may leave it out (it is the reference). `start` is
required, `control` is held to its own target, every other name is a policy that should have improved. Metrics are what
a stage measured: a JSON object such as {"test/bits_per_byte": 1.98} or {"test/accuracy": 0.78}.

Judge gain alone is not quality: a policy that repeats praise pleases any judge. Read it with KL, distinct-2 and length.
Everything here is a pure function of rows; `write_report` at the end reads and writes the files. The layout of the
table is in `table.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lit_palm.demo.files import read_json, read_jsonl, unit_hash, write_json
from lit_palm.demo.judge import Judge

__all__ = [
    "build_report", "check", "compare", "distinct_n", "find_metric", "paired_bootstrap", "pair_up", "pick_examples",
    "summarise", "write_report",
]  # fmt: skip

Row = Mapping[str, Any]
Score = Callable[[Sequence[str]], Sequence[float]]

MIN_PROMPTS = 256
# what a row is held to: the lower end of its gain, nats from the reference at most. Selecting from one's own samples
# strays further at equal gain; human pairs say nothing about one's own samples, and move the policy less
TARGETS = {"rejection-sampling": (0.3, 9.0), "online-dpo": (0.3, 12.0), "dpo": (0.05, 12.0)}
USUAL_TARGET = (0.3, 6.0)
METRICS = {"pretrain": "bits_per_byte", "finetune": "bits_per_byte", "reward": "accuracy"}
SAMPLE_COLUMNS = {"prompt": str, "completion": str, "ended": bool, "num_tokens": int}


def paired_bootstrap(
    differences: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of paired differences with its percentile bootstrap interval (Efron & Tibshirani 1993, chapter 13).

    Whole pairs are drawn with replacement: how hard a prompt is cancels within its pair.

    Returns:
        The mean, the lower and the upper end.
    """
    values = torch.tensor(list(differences), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    means = []
    for start in range(0, resamples, 1000):  # in chunks: 1,000 x prompts indices at a time
        shape = (min(1000, resamples - start), len(values))
        means.append(values[torch.randint(len(values), shape, generator=generator)].mean(1))
    tail = (1 - level) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return values.mean().item(), low, high


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words over all n-grams of all texts (Li et al. 2016): 1 says that nothing is repeated.

    Words are what white space separates, in lower case. It falls as more text is compared, so compare equal numbers of
    texts. 0 when there is no n-gram.
    """
    grams = [
        tuple(words[i : i + n]) for words in (text.lower().split() for text in texts) for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0


def pair_up(start: Sequence[Row], other: Sequence[Row], name: str) -> list[Row]:
    """The rows of `other` in the order of the prompts of `start`.

    Raises:
        ValueError: when a prompt appears twice, or the two do not have the same prompts.
    """
    by_prompt: dict[str, Row] = {}
    for row in other:
        if row["prompt"] in by_prompt:
            raise ValueError(f"samples {name!r}: the prompt {row['prompt']!r} appears twice; give one completion each")
        by_prompt[row["prompt"]] = row
    prompts = [row["prompt"] for row in start]
    odd = set(prompts) ^ by_prompt.keys()
    if odd:
        raise ValueError(
            f"samples {name!r} and 'start' have different prompts, {sorted(odd)[0]!r} for one; "
            "sample both from the same prompts"
        )
    return [by_prompt[prompt] for prompt in prompts]


def judged(rows: Sequence[Row], score: Score) -> list[float]:
    """The judge's score of every whole text: prompt and completion."""
    return list(score([row["prompt"] + row["completion"] for row in rows]))


def summarise(rows: Sequence[Row], scores: Sequence[float]) -> dict[str, float]:
    """Averages over completions: judge, kl (nats), distinct_2, length (tokens), ended (share)."""
    number = len(rows)
    return {
        "judge": sum(scores) / number,
        "kl": sum(row.get("kl", 0.0) for row in rows) / number,
        "distinct_2": distinct_n([row["completion"] for row in rows]),
        "length": sum(row["num_tokens"] for row in rows) / number,
        "ended": sum(row["ended"] for row in rows) / number,
    }


def compare(start: Sequence[Row], rows: Sequence[Row], score: Score) -> dict[str, float]:
    """`summarise` of `rows` (paired with `start`), and what changed: gain with its 95% interval, two ratios."""
    before, after = judged(start, score), judged(rows, score)
    gain, low, high = paired_bootstrap([b - a for a, b in zip(before, after, strict=True)])
    base, summary = summarise(start, before), summarise(rows, after)
    return {
        **summary,
        "gain": gain,
        "gain_low": low,
        "gain_high": high,
        "distinct_2_ratio": summary["distinct_2"] / base["distinct_2"] if base["distinct_2"] else 0.0,
        "length_ratio": summary["length"] / base["length"] if base["length"] else 0.0,
    }


def pick_examples(systems: Mapping[str, Sequence[Row]], score: Score, count: int = 5) -> list[dict[str, Any]]:
    """Some prompts with everybody's completion and score, chosen by a hash of the prompt: not by how good they look."""
    order = sorted(range(len(systems["start"])), key=lambda i: unit_hash("example", systems["start"][i]["prompt"]))
    return [
        {
            "prompt": systems["start"][i]["prompt"],
            **{
                name: {"completion": rows[i]["completion"], "judge": judged([rows[i]], score)[0]}
                for name, rows in systems.items()
            },
        }
        for i in order[:count]
    ]


def find_metric(metrics: Mapping[str, Any], name: str, where: str) -> float:
    """The metric of that name, whatever stage it is logged under; "test/" goes before "val/" before anything else.

    Raises:
        ValueError: when there is none, naming `where` and what there is.
    """
    found = {key: value for key, value in metrics.items() if key == name or key.endswith(f"/{name}")}
    for key in (f"test/{name}", f"val/{name}", name, *sorted(found)):
        if isinstance(found.get(key), int | float) and math.isfinite(found[key]):
            return float(found[key])
    raise ValueError(f"{where}: no finite metric {name!r}; it has {sorted(metrics)}")


def check(
    name: str, value: float | None, low: float | None = None, high: float | None = None, above: float | None = None
) -> dict[str, Any]:
    """One target: `low <= value <= high` and `above < value`, as far as given; None (not measured) misses it."""
    passed = (
        value is not None
        and (low is None or value >= low)
        and (high is None or value <= high)
        and (above is None or value > above)
    )
    return {"name": name, "value": value, "low": low, "high": high, "above": above, "passed": passed}


def build_report(
    samples: Mapping[str, Sequence[Row]],
    score: Score,
    metrics: Mapping[str, float],
    baselines: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Everything that the table shows, as plain data.

    Args:
        samples: name -> rows; "start" and at least one more.
        score: the judge.
        metrics: "pretrain" and "finetune" (bits per byte), "reward" (pair accuracy); what is absent misses its target.
        baselines: pair accuracies to set beside the reward model's, by name.

    Returns:
        Dictionary with `num_prompts`, `language_model`, `reward_model`, `systems` (name -> figures), `examples`,
        `checks` and `passed`.

    Raises:
        ValueError: when samples are missing or do not fit together.
    """
    if "start" not in samples or len(samples) < 2:
        raise ValueError(f"the report compares samples 'start' with at least one more; got {sorted(samples)}")
    start = pair_up(samples["start"], samples["start"], "start")
    systems = {"start": start} | {k: pair_up(start, v, k) for k, v in samples.items() if k != "start"}
    for name, rows in systems.items():
        kls = [row.get("kl", 0.0 if name == "start" else None) for row in rows]
        if not all(isinstance(kl, int | float) and math.isfinite(kl) for kl in kls):
            raise ValueError(f"samples {name!r}: column 'kl' (nats a completion) is missing or not a finite number")
    figures = {"start": summarise(start, judged(start, score))}
    figures |= {name: compare(start, rows, score) for name, rows in systems.items() if name != "start"}
    checks = [
        check("bits per byte after pre-training", metrics.get("pretrain"), high=2.10),
        check("bits per byte after fine-tuning", metrics.get("finetune"), high=2.00),
        check("pair accuracy of the reward model", metrics.get("reward"), low=0.75),
        check("held-out prompts", len(start), low=MIN_PROMPTS),
    ]
    for name, row in figures.items():
        if name == "control":
            checks.append(check("control: judge gain", row["gain"], low=-0.2, high=0.2))
        elif name != "start":
            least, most = TARGETS.get(name, USUAL_TARGET)
            checks += [
                check(f"{name}: lower end of the judge gain", row["gain_low"], above=least),
                check(f"{name}: KL to the reference, nats", row["kl"], high=most),
                check(f"{name}: distinct-2 over the start's", row["distinct_2_ratio"], low=0.80),
                check(f"{name}: length over the start's", row["length_ratio"], low=0.65, high=1.3),
            ]
    return {
        "num_prompts": len(start),
        "language_model": {key: metrics.get(key) for key in ("pretrain", "finetune")},
        "reward_model": {"reward model": metrics.get("reward"), **(baselines or {})},
        "systems": figures,
        "examples": pick_examples({k: v for k, v in systems.items() if k != "control"}, score),
        "checks": checks,
        "passed": all(item["passed"] for item in checks),
    }


def write_report(
    samples: Mapping[str, str | os.PathLike[str]],
    metrics: Mapping[str, str | os.PathLike[str]],
    judge: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> dict[str, Any]:
    """Read samples (name -> jsonl) and metrics (stage -> json), judge, write `output` (JSON); returns the report.

    The baselines come from the JSON file beside the judge (`judge.json`), when it is there.
    """
    unknown = metrics.keys() - METRICS.keys()
    if unknown:
        raise ValueError(f"unknown stages {sorted(unknown)} in the metrics; stages are {list(METRICS)}")
    rows = {name: read_jsonl(path, SAMPLE_COLUMNS) for name, path in samples.items()}
    values = {stage: find_metric(read_json(path), METRICS[stage], str(path)) for stage, path in metrics.items()}
    beside = Path(judge).with_suffix(".json")
    figures = read_json(beside) if beside.exists() else {}
    baselines = {label: figures[key] for key, label in (("judge", "judge"), ("vader", "VADER")) if key in figures}
    report = build_report(rows, Judge.load(judge).score, values, {**baselines, "chance": 0.5})
    write_json(output, report)
    return report
