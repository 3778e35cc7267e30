"""The surroundings of the modules' tests: a cache of their own, one thread, a quiet Lightning."""

from tests.modules.conftest import surroundings

__all__ = ["surroundings"]
