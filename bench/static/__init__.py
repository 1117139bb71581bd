"""The static performance report: what the kernels cost, found without a GPU. ``python -m bench.static`` writes it.

Every number comes from compiled or executed code. Registers, shared memory and instructions come from the machine code
of each target, counts of memory traffic from the compiled PTX on the simulated GPU of ``tests.ptxsim``, and launches
and bytes of a training step from the launches that fastmlp makes. Times are rooflines, which are lower bounds from
published rates, and the estimates of ``latency``. Nothing here measures speed.
"""
