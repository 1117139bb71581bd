"""The execute lane beyond the kernels' own tests: whole networks, warps in random order, memory traffic."""
