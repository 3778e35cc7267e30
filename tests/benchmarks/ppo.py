"""A whole PPO iteration beside palm-rlhf-pytorch's own trainer, in one run, as a ratio.

    python -m tests.benchmarks.ppo             # a table on the terminal, and runs/ppo.json; the peer takes minutes
    python -m tests.benchmarks.ppo --quick     # the peer completes 8 of the 64 prompts, and that part is scaled up
    python -m tests.benchmarks.ppo --short     # a tiny network, to see that everything runs

An iteration is what `RLHFTrainer.train` and one epoch of `LitPolicy` do between two updates of the sampling policy: 64
prompts of 64 ids are continued by 64 ids, scored by a reward model, and learned from in 4 passes of minibatches of 16.
Policy, value (critic) and reward model are networks of one shape each (d 512, 8 layers, 8 heads of 64, one key/value
head, 256 ids, about 30M parameters), float32, all weights trained. Ours runs a frozen reference beside them, which the
peer does without, and makes advantages per token; nothing of that is taken off its time.

The peer completes one prompt at a time and without a cache, so that its rollout is linear in the number of prompts;
`--quick` scales the rollout of 8 prompts by 8 and adds the measured update of 64 rows, made of copies of the 8.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
import warnings
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_palm import (
    PPO,
    ByteTokenizer,
    LitPolicy,
    LitRewardModel,
    PaLMConfig,
    PreferenceData,
    PromptData,
    RewardModel,
    RolloutConfig,
    Sampling,
)
from tests.benchmarks.alignment import adamw, text, written


@dataclass
class Shape:
    """Sizes of one run; the defaults are the ones that figures are quoted for."""

    d_model: int = 512
    num_layers: int = 8
    num_heads: int = 8
    prompts: int = 64
    prompt_length: int = 64
    new_tokens: int = 64
    passes: int = 4
    minibatch: int = 16
    sampled: int = 64
    """Prompts that the peer really completes; the rollout of the others is scaled."""
    repeats: int = 3


SHORT = Shape(32, 2, 2, 4, 6, 4, 2, 2, 4, 1)

# ---------------------------------------------------------------- ours


class Iterations(Callback):
    """When each iteration ended, and where the seconds of the last one went."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.phases: dict[str, float] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends.append(time.perf_counter())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        once = ("time/old_logps_s", "time/check_s")  # of the first collection alone
        names = [name for name in trainer.callback_metrics if name.startswith("time/") and name not in once]
        self.phases = {name: float(trainer.callback_metrics[name]) for name in names}


def reward_model(shape: Shape, folder: Path) -> str:
    """The checkpoint of a reward model of the shape, after one step."""
    rows = [{"prompt": text(i, 4), "chosen": text(i + 1, 4), "rejected": text(i + 2, 4)} for i in range(2)]
    torch.manual_seed(1)
    module = LitRewardModel(network(shape), optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-6), calibrate="none")
    data = PreferenceData(train=written(folder, rows), batch_size=2, tokenizer="bytes", cache_dir=str(folder))
    trainer = quiet(folder, max_steps=1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(folder / "reward.ckpt")
    return str(folder / "reward.ckpt")


def network(shape: Shape) -> PaLMConfig:
    return PaLMConfig(
        vocab_size=ByteTokenizer().vocab_size,
        d_model=shape.d_model,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        head_dim=shape.d_model // shape.num_heads,
        max_length=512,
    )


def quiet(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, **options,
    )  # type: ignore[arg-type]  # fmt: skip


def our_ppo(shape: Shape, precision: str, folder: Path, iterations: int = 1) -> dict[str, float]:
    """Seconds of an iteration (the median of `iterations`, after one that warms up), and of the parts of the last."""
    torch.manual_seed(0)
    module = LitPolicy(
        network(shape),
        objective=PPO(),
        rewards=[RewardModel(reward_model(shape, folder))],
        rollout=RolloutConfig(shape.prompts, passes=shape.passes, minibatch_size=shape.minibatch),
        sampling=Sampling(max_new_tokens=shape.new_tokens, min_new_tokens=shape.new_tokens),
        optimizer=adamw,
    )
    prompts = [{"prompt": text(i, shape.prompt_length - 1)} for i in range(4 * shape.prompts)]  # a BOS is added
    data = PromptData(train=written(folder, prompts), tokenizer="bytes", cache_dir=str(folder))
    clock = Iterations()
    trainer = quiet(folder, max_epochs=1 + iterations, precision=precision, callbacks=[clock], gradient_clip_val=1.0)
    trainer.fit(module, datamodule=data)
    seconds = statistics.median(b - a for a, b in zip(clock.ends[:-1], clock.ends[1:], strict=True))
    return {"seconds": seconds, **clock.phases}


# ---------------------------------------------------------------- palm-rlhf-pytorch


def peer_ppo(shape: Shape, sampled: int | None = None) -> dict[str, float]:
    """Seconds of an iteration of `RLHFTrainer`: `sampled` prompts one by one, scaled to all, and the update of all."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from palm_rlhf_pytorch import PaLM, RewardModel, RLHFTrainer

    torch.manual_seed(0)
    sizes = {
        "num_tokens": 256, "dim": shape.d_model, "depth": shape.num_layers, "heads": shape.num_heads,
        "dim_head": shape.d_model // shape.num_heads,
    }  # fmt: skip
    palm = PaLM(**sizes)
    scorer = RewardModel(PaLM(**sizes), num_binned_output=6, use_lora=False)
    prompts = torch.randint(1, 256, (shape.prompts, shape.prompt_length))
    trainer = RLHFTrainer(
        palm=palm, reward_model=scorer, prompt_token_ids=prompts, actor_lora=False, critic_lora=False,
        minibatch_size=shape.minibatch, epochs=shape.passes, accelerate_kwargs={"cpu": True},
    )  # fmt: skip
    count = min(sampled or shape.sampled, shape.prompts)
    update, step = trainer.learn, trainer.actor_optim.step
    times: dict[str, float] = {"steps": 0}

    def counted(*args: Any, **kwargs: Any) -> Any:
        times["steps"] += 1
        return step(*args, **kwargs)

    def learn(memories: Any) -> None:
        """The trainer's own update, of as many rows as an iteration has, with the time that it takes."""
        times["rollout"] = time.perf_counter() - started
        rows = deque(list(memories) * -(-shape.prompts // count))
        while len(rows) > shape.prompts:
            rows.pop()
        start = time.perf_counter()
        update(rows)
        times["update"] = time.perf_counter() - start

    trainer.learn, trainer.actor_optim.step = learn, counted
    options = {"max_seq_len": shape.prompt_length + shape.new_tokens, "temperature": 1.0}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        started = time.perf_counter()
        trainer.train(num_episodes=1, max_timesteps=count, update_timesteps=count, **options)
    rollout = times["rollout"] * shape.prompts / count
    parts = {"rollout_s": rollout, "update_s": times["update"], "steps": times["steps"], "sampled": count}
    return {"seconds": rollout + times["update"], **parts}


# ---------------------------------------------------------------- in turn


def ppo(shape: Shape, precision: str = "32-true") -> dict[str, Any]:
    """Both sides in turn: seconds an iteration of each run, their parts, and the median of the peer's over ours."""
    mine, peer = [], []
    for _ in range(shape.repeats):
        with tempfile.TemporaryDirectory() as folder:
            mine.append(our_ppo(shape, precision, Path(folder)))
        peer.append(peer_ppo(shape))
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(mine, peer, strict=True)]
    return {"ours": mine, "peer": peer, "ratios": ratios, "ratio": statistics.median(ratios)}


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="A PPO iteration beside palm-rlhf-pytorch's, as a ratio.")
    parser.add_argument("--precision", default="32-true", help="of ours (default 32-true)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each side (default 1)")
    parser.add_argument("--quick", action="store_true", help="scale the peer's rollout from 8 prompts")
    parser.add_argument("--short", action="store_true", help="a tiny network, to see that everything runs")
    parser.add_argument("--ours", action="store_true", help="leave the peer out")
    parser.add_argument("--output", type=Path, default=Path("runs/ppo.json"), help="where the figures go")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    shape = SHORT if args.short else Shape(repeats=args.repeats, sampled=8 if args.quick else 64)
    if args.ours:
        with tempfile.TemporaryDirectory() as folder:
            for name, value in our_ppo(shape, args.precision, Path(folder), args.repeats).items():
                print(f"{name:24s} {value:8.3f}")
        return
    result = ppo(shape, args.precision)
    for name, rows in (("ours", result["ours"]), ("peer", result["peer"])):
        print(f"{name:5s} {statistics.median(r['seconds'] for r in rows):8.2f} s an iteration")
    print(f"palm-rlhf-pytorch takes {result['ratio']:.1f} times as long")
    figures = {"torch": torch.__version__, "threads": args.threads, "precision": args.precision,
               "shape": asdict(shape), "results": {"ppo": result}}  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
