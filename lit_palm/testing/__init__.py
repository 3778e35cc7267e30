"""What authors of plugins test against: conformance classes, and tiny batches and networks for tests of their own.

    import pytest
    from lit_palm.testing import ObjectiveConformance
    from my_package import MyLoss

    class TestMyLoss(ObjectiveConformance):
        @pytest.fixture
        def objective(self):
            return MyLoss            # or functools.partial(MyLoss, beta=0.3)

The tests that the class inherits say, each in its docstring, what it means when they fail. `ObjectiveChecks` has those
that need tensors alone (a second), `ObjectiveRuns` those that train (half a minute), `ObjectiveConformance` both.
It needs pytest.
"""

try:
    import pytest
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("lit_palm.testing needs pytest: pip install pytest", name="pytest") from error

pytest.register_assert_rewrite(
    *(
        f"{__name__}.{module}"
        for module in ("loss_checks", "collection_checks", "package_checks", "objectives", "rewards")
    )
)

from lit_palm.testing.batches import (  # noqa: E402
    DataKind,
    natural_data,
    tiny_batch,
    tiny_experience,
    tiny_network,
    tiny_output,
)
from lit_palm.testing.objectives import ObjectiveChecks, ObjectiveConformance, ObjectiveRuns  # noqa: E402

__all__ = [
    "DataKind",
    "ObjectiveChecks",
    "ObjectiveConformance",
    "ObjectiveRuns",
    "natural_data",
    "tiny_batch",
    "tiny_experience",
    "tiny_network",
    "tiny_output",
]
