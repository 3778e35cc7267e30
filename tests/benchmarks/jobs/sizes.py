"""How large a measurement is: the sizes that figures are quoted for, smaller ones, and tiny ones."""

from __future__ import annotations

from typing import Literal, TypeVar

__all__ = ["Mode", "network", "pick"]

Mode = Literal["full", "quick", "short"]
Value = TypeVar("Value")


def pick(mode: Mode, full: Value, quick: Value, short: Value) -> Value:
    """One of three."""
    return {"full": full, "quick": quick, "short": short}[mode]


def network(mode: Mode, **changes: int) -> dict[str, int]:
    """The 30M network (d 512, 8 layers, 8 heads of 64, one key/value head), or a tiny one."""
    tiny = {"d_model": 32, "num_layers": 2, "num_heads": 2}
    return {**(tiny if mode == "short" else {}), **changes}
