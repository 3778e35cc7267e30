"""palm-rlhf-pytorch's own PPO trainer.

It completes one prompt at a time and without a cache, so that its rollout is linear in the number of prompts: a quick
measurement completes some of them, scales that time to all, and adds the update of all rows, made of copies.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from tests.benchmarks.inputs import Size, token_ids
from tests.benchmarks.peers.language import palm
from tests.benchmarks.worker import Work


def ppo(
    size: dict[str, int], prompts: int, prompt: int, new: int, passes: int, minibatch: int, rank: int, sampled: int
) -> Work:  # fmt: skip
    """An iteration of `RLHFTrainer`, with a critic and a reward model of the policy's size.

    Args:
        size: of the networks.
        prompts: of an iteration.
        prompt: ids of each.
        new: ids of a completion.
        passes: over the iteration's rows.
        minibatch: rows of an optimiser step.
        rank: of its LoRA on queries, keys, values and attention's output; 0: all weights are trained.
        sampled: prompts that are really completed; the time of the others is scaled.
    """
    from palm_rlhf_pytorch import RewardModel, RLHFTrainer

    shape = Size(**size)
    torch.manual_seed(0)
    trainer = RLHFTrainer(
        palm=palm(shape), reward_model=RewardModel(palm(shape), num_binned_output=6, use_lora=False),
        prompt_token_ids=token_ids(0, prompts, prompt), actor_lora=rank > 0, critic_lora=rank > 0,
        actor_lora_r=rank, critic_lora_r=rank,
        minibatch_size=minibatch, epochs=passes, accelerate_kwargs={"cpu": True},
    )  # fmt: skip
    update, step, began, times = trainer.learn, trainer.actor_optim.step, 0.0, {}
    taken = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        return step(*args, **kwargs)

    def learn(memories: Any) -> None:
        times["rollout"] = (time.perf_counter() - began) * prompts / sampled
        rows = deque((list(memories) * -(-prompts // sampled))[:prompts])
        start = time.perf_counter()
        update(rows)
        times["update"] = time.perf_counter() - start

    trainer.learn, trainer.actor_optim.step = learn, counted

    def run() -> dict[str, Any]:
        nonlocal began, taken
        began, taken = time.perf_counter(), 0
        length = {"max_seq_len": prompt + new, "temperature": 1.0}
        trainer.train(num_episodes=1, max_timesteps=sampled, update_timesteps=sampled, **length)
        parts = {"completions": prompts, "sampled": sampled, "steps": taken, **times}
        return {"cost": times["rollout"] + times["update"], **parts}

    return run
