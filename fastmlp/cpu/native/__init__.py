"""The training step of a small network as one call of machine code, which numba compiles.

On a CPU a step of a small network takes as long as its calls of operators take. Here all of them are one call: gather,
forward, loss, backward and update of all layers, for one step or for many of them without Python in between.

    machine_code   compiles, keeps and loads units of machine code
    network        describes a network to the step, and calls it
    layout         what the two arrays of the description contain
    whole          the unit of the step, which calls those of
    products, activations, derivatives, dropout, losses, row_weights, rules
    tiles, transposed, pointers, erfcx    what the units consist of

The files of the last three lines need numba, and only ``machine_code`` imports them. The code runs in the calling
thread alone, and computes a sum always in the same order. So results are the same on every run, whatever the number of
threads is. Another processor may have other instructions and so other roundings.
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
