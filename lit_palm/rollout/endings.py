"""When a completion ends: EOS, a stop text, or the limit of its length. All engines agree on it through this."""

from __future__ import annotations

from collections.abc import Callable

from lit_palm.rollout.sampling import Sampling

__all__ = ["NOT_FINITE", "Ending"]

NOT_FINITE = (
    "the network gives logits that are not finite: its training has diverged; go back to an earlier checkpoint and "
    "lower the learning rate"
)


class Ending:
    """Watches one completion for what ends it.

    Args:
        sampling: stop texts, and before how many tokens nothing ends the completion.
        eos_id: the id that ends a completion; None: there is none.
        decode: ids -> text; needed for stop texts.
    """

    def __init__(self, sampling: Sampling, eos_id: int | None, decode: Callable[[list[int]], str] | None) -> None:
        self.sampling, self.eos_id, self.decode = sampling, eos_id, decode
        self.recent: list[int] = []
        # all that stop texts can reach back to: every token adds at least a byte, save special ones
        self.tail = 8 + max((len(s.encode()) for s in sampling.stop), default=0)

    def __call__(self, token: int, step: int) -> str | None:
        """Why the completion ends with this token, its number `step` from 0: "eos" or "stop"; None: it goes on."""
        sampling = self.sampling
        if token == self.eos_id and step >= sampling.min_new_tokens:
            return "eos"
        if sampling.stop:
            assert self.decode is not None
            recent = self.recent
            recent.append(token)
            del recent[: -self.tail]
            if step + 1 < sampling.min_new_tokens:
                return None
            text = self.decode(recent)
            before = len(self.decode(recent[:-1])) if sampling.min_new_tokens else 0
            # a stop text that came too early to count is still in the tail: it must end within this token
            if any(s in text and text.rfind(s) + len(s) > before for s in sampling.stop):
                return "stop"
        return None
