"""The training step of a small network as one call of machine code, which numba compiles.

On a CPU a step of a small network takes as long as its calls of operators take. Here all of them are one call: gather,
forward, loss, backward and update of all layers, for one step or for many of them without Python in between.

    machine_code   compiles, keeps and loads units of machine code
    network        describes a network to the step, and calls it
    layout         what the two arrays of the description contain
    whole          the unit of the step, which calls those of
    products, activations, derivatives, dropout, losses, row_weights, backward, rules
    team           how several threads share a step
    tiles, transposed, pointers, erfcx    what the units consist of

The files of the last four lines need numba, and only ``machine_code`` imports them. A step runs in the calling thread,
or in a team of threads. It computes a sum always in the same order, which depends on the number of threads for dX
alone. So results are the same on every run with as many threads. Another processor may have other instructions and so
other roundings.
"""

from . import layout
from .machine_code import Units, installed, missing, units
from .network import LayerParts, LossUnit, NativeMembers, NativeNetwork, Parameter, unit_names

__all__ = [
    "LayerParts",
    "LossUnit",
    "NativeMembers",
    "NativeNetwork",
    "Parameter",
    "Units",
    "installed",
    "layout",
    "missing",
    "unit_names",
    "units",
]
