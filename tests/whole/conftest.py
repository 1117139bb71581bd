"""What these tests share with those of the kernels."""

from tests.kernels.conftest import bfloat16_rounds_to_nearest  # noqa: F401  a fixture for these tests too
