"""DPO on pairs that the policy samples itself and a reward judges: best against worst of several completions.

lit-palm fit --config plugins/lit-palm-dpo/configs/online-dpo.yaml --data.train=my_prompts.jsonl
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_palm import Experience
from lit_palm.objectives.base import Need
from lit_palm_dpo.dpo import DPO

__all__ = ["OnlineDPO"]


class OnlineDPO(DPO):
    """DPO whose pairs come from the policy's own samples.

    Of the completions sampled for a prompt, the best by `scores` becomes the chosen one and the worst the rejected one;
    the others are dropped. Where all score alike there is no pair. Small collections, each gone through once, are the
    online DPO of Guo et al. 2024; a few large ones the iterative DPO of Xu et al. 2023 and Dong et al. 2024.

    With `margin` the difference of the two scores is subtracted from the difference of rewards.

    Args:
        missing_eos_penalty: subtracted from the score of a completion that did not end by itself.
        kwargs: the arguments of `DPO`.

    Raises:
        ValueError: an argument is out of range; when a run starts: one completion a prompt makes no pair.
    """

    API_VERSION: ClassVar[int] = 1

    def __init__(self, missing_eos_penalty: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.missing_eos_penalty = missing_eos_penalty

    @property
    def needs(self) -> frozenset[Need]:
        """Samples, scores and (to report the divergence) log-probabilities; the reference unless nothing reads it."""
        return super().needs | frozenset({"rollouts", "reward", "old_logps"})

    def num_kept(self, num_prompts: int, completions: int) -> int:
        """Two of each prompt."""
        if completions < 2:
            raise ValueError(
                "OnlineDPO compares completions of one prompt: set rollout.completions_per_prompt to 2 or more"
            )
        return 2 * num_prompts

    def prepare(self, experience: Experience) -> Experience:
        """Keep the best and the worst row of every group, with `rank` 0 and 1 (both 0 where all score alike)."""
        by_row = experience["row"].argsort()  # so that neither ties nor the result depend on the order of rows
        group: Tensor = experience["group"][by_row]
        _, sizes = group.unique(return_counts=True)
        completions = int(sizes[0])
        assert bool((sizes == completions).all()), "the host samples equally many completions of every prompt"
        scores = experience["scores"].float()
        if self.missing_eos_penalty:
            scores = scores - self.missing_eos_penalty * (~experience["ended"]).float()
        rows = by_row[group.argsort(stable=True)].view(-1, completions)
        table = scores[rows]
        best = table.argmax(1)
        # the last of equal scores: never the same row as the first of equal ones
        worst = completions - 1 - table.flip(1).argmin(1)
        gap = table.amax(1) - table.amin(1)
        picked = rows.gather(1, torch.stack([best, worst], dim=1))
        metrics = self._found(experience, table, gap)
        kept = experience.select(picked.flatten())
        kept["rank"] = torch.stack([torch.zeros_like(best), (gap > 0).long()], dim=1).flatten()
        if self.uses_margin:
            kept["margin"] = gap.repeat_interleave(2)
        kept["metrics"] = metrics
        return kept

    def _found(self, experience: Experience, table: Tensor, gap: Tensor) -> dict[str, float]:
        """What the collection was like, before rows are dropped."""
        metrics = {
            "objective/scores": experience["scores"].mean().item(),
            "objective/scores_margin": gap.mean().item(),
            "reward": table.mean().item(),
            "reward_std": table.std(1).mean().item(),
            "frac_reward_zero_std": (gap == 0).float().mean().item(),
            "val/num_eos_tokens": float(experience["ended"].sum()),
        }
        mask, logps = experience["loss_mask"], experience["old_logps"]
        metrics["objective/entropy"] = -torch.where(mask, logps, 0).sum(1).mean().item()
        if "reference" in self.needs:
            apart = torch.where(mask, logps - experience["ref_logps"], 0)
            metrics["objective/kl"] = apart.sum(1).mean().item()
        return metrics
