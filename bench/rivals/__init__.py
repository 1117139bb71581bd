"""The contenders, each in a file of its own behind one protocol (``protocol.Rival``); ``rivals_for`` lists them.

To add one: a module with a class of that protocol, and a line in ``RIVALS``.
"""

from __future__ import annotations

from bench.problems import Problem

from .apex_mlp import ApexMLP
from .compiled import Compiled
from .cuda_graph import CudaGraph
from .eager import Eager, EagerFloat32
from .fastmlp_step import FastMLP, FastMLPEnsemble, FastMLPModules, FastMLPOneByOne
from .inplace import InPlace
from .jax_members import JaxMembers
from .jax_operations import JaxOperation
from .jax_step import JaxStep
from .liger import Liger
from .member_loops import EagerLoop, FastMLPLoop
from .numpy_loop import NumpyLoop
from .operations import CompiledOperation, EagerOperation, FastMLPOperation
from .protocol import Rival
from .sklearn_mlp import SklearnMLP
from .tiny_cuda_nn import TinyCudaNN
from .train_kernel import TrainKernel
from .vmap import Vmap, VmapCompiled
from .whole import WholeStep

__all__ = ["BASELINE", "OURS", "RIVALS", "rivals_for"]

#: The contender that ratios are relative to, and fastmlp.
BASELINE, OURS = "eager", "fastmlp"

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")

#: Without torch.compile's own graphs, which would leave the copies of the batch outside.
WHOLE_MODES = ("default", "max-autotune-no-cudagraphs")

RIVALS: tuple[Rival, ...] = (
    FastMLP(),
    FastMLPOneByOne(),
    FastMLPModules(),
    Eager(),
    Eager(fused=True),
    EagerFloat32(),
    CudaGraph(),
    *(Compiled(mode) for mode in COMPILE_MODES),
    *(WholeStep(mode) for mode in WHOLE_MODES),
    InPlace(),
    JaxStep(),
    SklearnMLP(),
    NumpyLoop(),
    ApexMLP(),
    TinyCudaNN(),
    TrainKernel(),
    FastMLPEnsemble(),
    FastMLPLoop(),
    EagerLoop(),
    Vmap(),
    VmapCompiled(),
    JaxMembers(),
    FastMLPOperation(),
    EagerOperation(),
    *(CompiledOperation(mode) for mode in COMPILE_MODES),
    JaxOperation(),
    Liger(),
)


def rivals_for(problem: Problem) -> list[Rival]:
    """Every contender of the problem's kind, available or not."""
    return [rival for rival in RIVALS if problem.kind in rival.kinds]
