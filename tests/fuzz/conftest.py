"""The fixture that the fuzzer shares with the tests of the kernels; plugin.py has the fuzzer's options."""

from tests.kernels.conftest import bfloat16_rounds_to_nearest  # noqa: F401  a fixture for these tests too
