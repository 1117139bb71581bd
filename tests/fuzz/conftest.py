"""What the fuzzer shares with the tests of the kernels; its options are in plugin.py."""

from tests.kernels.conftest import bfloat16_rounds_to_nearest  # noqa: F401  a fixture for these tests too
