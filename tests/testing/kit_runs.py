"""Runs the checks of a kit by hand, so that a test can say which of them fail."""

from __future__ import annotations

from typing import Any

import pytest


def failures(factory: Any, kit: type, **attributes: Any) -> dict[str, str]:
    """The checks that fail, with what they say.

    Args:
        factory: what the author's fixture would give.
        kit: the kit's class.
        attributes: class attributes that the author would set.
    """
    tests, failed = type("Kit", (kit,), attributes)(), {}
    for name in dir(tests):
        if name.startswith("test_"):
            try:
                getattr(tests, name)(factory)
            except pytest.skip.Exception:  # a check says so itself where it has nothing to look at
                pass
            except Exception as error:
                failed[name] = str(error)
    return failed
