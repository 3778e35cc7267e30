"""What authors of plugins test against: conformance classes, and tiny batches and networks for tests of their own.

    import pytest
    from lit_palm.testing import ObjectiveConformance
    from my_package import MyLoss

    class TestMyLoss(ObjectiveConformance):
        @pytest.fixture
        def objective(self):
            return MyLoss            # or functools.partial(MyLoss, beta=0.3)

The tests that the class inherits say, each in its docstring, what it means when they fail. `ObjectiveChecks` has those
that need tensors alone (a second), `ObjectiveRuns` those that train (half a minute), `ObjectiveConformance` both; what
is to be set otherwise for an unusual objective is listed in `lit_palm.testing.subject.Subject`. `RewardConformance`
does the same for rewards, with the fixture `reward`, and `EngineConformance` for engines, with `engine`. It needs
pytest.
"""

try:
    import pytest  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("lit_palm.testing needs pytest: pip install pytest", name="pytest") from error

from lit_palm.testing.batches import (
    DataKind,
    natural_data,
    tiny_batch,
    tiny_experience,
    tiny_network,
    tiny_output,
)
from lit_palm.testing.engines import EngineConformance
from lit_palm.testing.objectives import ObjectiveChecks, ObjectiveConformance, ObjectiveRuns
from lit_palm.testing.reward_subject import tiny_reward_batch
from lit_palm.testing.rewards import RewardConformance

__all__ = [
    "DataKind",
    "EngineConformance",
    "ObjectiveChecks",
    "ObjectiveConformance",
    "ObjectiveRuns",
    "RewardConformance",
    "natural_data",
    "tiny_batch",
    "tiny_experience",
    "tiny_network",
    "tiny_output",
    "tiny_reward_batch",
]
