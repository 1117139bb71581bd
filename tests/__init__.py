"""The test suite of fastmlp."""
