"""The fixtures that these tests share with the tests of the kernels."""

from tests.kernels.conftest import bfloat16_rounds_to_nearest  # noqa: F401  a fixture for these tests too
