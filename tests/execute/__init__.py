"""Tests of the execute lane beyond the kernels' own: large tiles, warps in random order, memory traffic."""
