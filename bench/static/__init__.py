"""The static performance report: what the kernels cost, found without a GPU. ``python -m bench.static`` writes it.

Every number comes from code that was really compiled or really executed: registers, shared memory and instructions from
the machine code of each target, counts of memory traffic from the compiled PTX run on the simulated GPU of
``tests.ptxsim``, launches and bytes of a training step from the launches that the library makes. Times are rooflines,
that is lower bounds from published rates; nothing here is a measurement of speed.
"""
