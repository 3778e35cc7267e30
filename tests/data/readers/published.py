"""Rows with every column that the hub serves, in its nesting, with texts of our own; and how tests read them."""

from __future__ import annotations

from typing import Any

from lit_palm.data.faults import count, counted
from lit_palm.data.readers import Reader, View
from lit_palm.data.sources import Row

Columns = dict[str, Any]


def read(reader: Reader, view: View, path: str, split: str = "train") -> tuple[list[Row], list[str]]:
    """The rows of a view, and a line for every reason why something was left out."""
    tally: dict[str, Any] = {}
    rows = list(reader.rows(path, split, view, None, lambda r, why: count(tally, why, "left out", r.where)))
    return rows, [line.replace(path, "x") for line in counted(tally)]


def columns(reader: Reader, view: View, path: str) -> list[Columns]:
    """The columns of a view's rows, when nothing was left out."""
    rows, left_out = read(reader, view, path)
    assert not left_out
    return [row.columns for row in rows]


def said(*turns: str) -> list[dict[str, str]]:
    """Messages, the user's first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def hh(*turns: str) -> str:
    """A dialogue of Anthropic/hh-rlhf."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(turns))


def oasst(name: str, parent: str | None, text: str, tree: str = "t", **changes: Any) -> Columns:
    """A row of OpenAssistant/oasst1 as the hub's Parquet files have it."""
    role = changes.pop("role", "prompter" if parent is None else "assistant")
    return {
        "message_id": name, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": text, "role": role, "lang": "en", "review_count": 3, "review_result": True, "deleted": False,
        "rank": None, "synthetic": False, "model_name": None,
        "detoxify": {"toxicity": 0.1, "severe_toxicity": 0.0, "obscene": 0.0, "identity_attack": 0.0, "insult": 0.0,
                     "threat": 0.0, "sexual_explicit": 0.0},
        "message_tree_id": tree, "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [2]},
        "labels": {"name": ["spam", "quality"], "value": [0.0, 0.75], "count": [3, 3]},
        **changes,
    }  # fmt: skip


def nested(rows: list[Columns]) -> list[Columns]:
    """The same messages as the files `*.trees.jsonl.gz` have them: a row is a tree."""

    def node(row: Columns) -> Columns:
        kept = {k: v for k, v in row.items() if k not in ("message_tree_id", "tree_state", "detoxify", "created_date")}
        labels = {"spam": {"value": 0.0, "count": 3}, "quality": {"value": 0.75, "count": 3}}
        replies = [node(r) for r in rows if r["parent_id"] == row["message_id"]]
        return {**kept, "labels": labels, "emojis": {"+1": 2}, "replies": replies}

    roots = [row for row in rows if row["parent_id"] is None]
    return [
        {"message_tree_id": r["message_tree_id"], "tree_state": r["tree_state"], "prompt": node(r), "origin": "x"}
        for r in roots
    ]


def shp(
    post: str = "qt3nxl", a: str = "A", b: str = "B", label: int = 1, ratio: float = 3.0, **changes: Any
) -> Columns:
    """A row of stanfordnlp/SHP."""
    high, low = round(10 * ratio), 10
    return {
        "post_id": post, "domain": "askculinary_train", "upvote_ratio": 0.98, "history": f"What is {post}?",
        "c_root_id_A": "hkh25sc", "c_root_id_B": "hkh25lp", "created_at_utc_A": 1636822112,
        "created_at_utc_B": 1636822110, "score_A": high if label else low, "score_B": low if label else high,
        "human_ref_A": a, "human_ref_B": b, "labels": label, "seconds_difference": 2.0, "score_ratio": ratio,
        **changes,
    }  # fmt: skip


def ultrafeedback(ratings: list[list[Any]], overall: list[Any] | None = None, **changes: Any) -> Columns:
    """A row of openbmb/UltraFeedback; ratings of instruction following, honesty, truthfulness, helpfulness."""
    names = ("instruction_following", "honesty", "truthfulness", "helpfulness")

    def annotation(name: str, rating: Any) -> Columns:
        typed = {"Type": ["1"], "Rationale For Rating": "r"} if name in names[2:] else {}
        return {"Rating": rating, "Rationale": "because", **typed}

    def completion(number: int, marks: list[Any]) -> Columns:
        return {
            "annotations": {name: annotation(name, mark) for name, mark in zip(names, marks, strict=True)},
            "custom_system_prompt": "Be helpful.", "model": f"model-{number}", "principle": "helpfulness",
            "response": f"answer {number}", "critique": "c", "fine-grained_score": 3.0,
            "overall_score": (overall or [None] * len(ratings))[number],
        }  # fmt: skip

    return {
        "source": "sharegpt", "instruction": "Say it.", "models": [f"model-{i}" for i in range(len(ratings))],
        "completions": [completion(i, marks) for i, marks in enumerate(ratings)],
        "correct_answers": ["None"], "incorrect_answers": ["None"], **changes,
    }  # fmt: skip


def binarized(chosen: str, rejected: str, scores: tuple[float, float] = (8.5, 6.0), **changes: Any) -> Columns:
    """A row of HuggingFaceH4/ultrafeedback_binarized."""
    return {
        "prompt": "Say it.", "prompt_id": "ab12", "chosen": said("Say it.", chosen),
        "rejected": said("Say it.", rejected), "messages": said("Say it.", chosen),
        "score_chosen": scores[0], "score_rejected": scores[1], **changes,
    }  # fmt: skip


def helpsteer(prompt: str, response: str, *marks: int, **changes: Any) -> Columns:
    """A row of nvidia/HelpSteer and HelpSteer2: helpfulness, correctness, coherence, complexity, verbosity."""
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    return {"prompt": prompt, "response": response, **dict(zip(names, marks, strict=True)), **changes}


def helpsteer2_preference(strength: int, split: str = "train", prompt: str = "c#", **changes: Any) -> Columns:
    """A row of the folder `preference` of nvidia/HelpSteer2."""
    return {
        "split": split, "prompt": prompt, "response_1": "first", "response_2": "second",
        "preference_strength": strength, "preference_statement": "s", "preference_elaboration": "e",
        "three_most_similar_preferences": [{"statement": "s", "elaboration": "e", "strength": strength}] * 3,
        "all_preferences_unprocessed": [{"strength": strength, "justification": "j"}] * 3, **changes,
    }  # fmt: skip


def helpsteer3(preference: int, **changes: Any) -> Columns:
    """A row of the configuration `preference` of nvidia/HelpSteer3."""
    judged = {"score": preference, "reasoning": "r", "feedback1": "f", "feedback2": "f"}
    return {
        "domain": "general", "language": "english", "context": said("Hi", "Hello", "And?"), "response1": "first",
        "response2": "second", "overall_preference": preference, "individual_preference": [judged] * 3, **changes,
    }  # fmt: skip


POST = {"id": "t3_1", "post": "I fell.", "title": "Ouch", "subreddit": "tifu", "site": None, "article": None}
NEWS = {
    "id": "167f",
    "post": None,
    "title": "Sent off",
    "subreddit": None,
    "site": "dailymail",
    "article": "He fouled.",
}


def comparison(choice: int, identity: str = "t3_2vwp1w", **changes: Any) -> Columns:
    """A row of the part `comparisons` of openai/summarize_from_feedback."""
    return {
        "info": {**POST, "id": identity},
        "summaries": [
            {"text": " fell down", "policy": "sup4_ppo_rm3_kl10", "note": "n"},
            {"text": " I fell, it hurt", "policy": "ref", "note": None},
        ],
        "choice": choice, "worker": "w", "batch": "batch9", "split": "train", "extra": {"confidence": 8}, **changes,
    }  # fmt: skip


def axis(overall: int | None, **changes: Any) -> Columns:
    """A row of the part `axis` of openai/summarize_from_feedback."""
    marks = {"overall": overall, "accuracy": 5, "coverage": 4, "coherence": 2, "compatible": None}
    return {
        "info": POST,
        "summary": {"text": "fell", "policy": "ref", "note": "n", "axes": marks},
        "worker": "w", "batch": "b", "split": "test", **changes,
    }  # fmt: skip


NEWS = {
    "id": "167f",
    "post": None,
    "title": "Sent off",
    "subreddit": None,
    "site": "dailymail",
    "article": "He fouled.",
}


def gsm8k(question: str = "How many clips?", final: str = "72") -> Columns:
    """A row of openai/gsm8k."""
    return {"question": question, "answer": f"She sold 48/2 = <<48/2=24>>24 in May.\nAnd more.\n#### {final}"}
