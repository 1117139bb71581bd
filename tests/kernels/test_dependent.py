"""Programmatic dependent launch: who may use it, every kernel waits first, and launches keep the option."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Iterator

import pytest
import torch

from tests.conftest import INTERPRETING

if INTERPRETING:
    pytest.skip("the interpreter has no dependent launches", allow_module_level=True)

from triton.runtime.jit import JITFunction

import fastmlp
from fastmlp import TrainStep, kernels
from fastmlp.kernels.dependent import dependent_launch
from fastmlp.step.triton_step import TritonStep
from tests.kernels.test_launch import Gpu, one_launch
from tests.ptxsim import SimulatedGPU
from tests.support.cuda_graph import SimulatedCuda

pytestmark = pytest.mark.launch


@pytest.fixture(autouse=True)
def off_again() -> Iterator[None]:
    yield
    dependent_launch(False)


def test_every_kernel_waits_in_its_first_statement():
    """So no program of any kernel reads or writes anything, or ends, before the wait."""
    found = 0
    for module in pkgutil.iter_modules(kernels.__path__):
        for name, kernel in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).items():
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                (function,) = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn))).body
                assert isinstance(function, ast.FunctionDef)
                first = function.body[1 if ast.get_docstring(function) else 0]
                assert ast.unparse(first) == "wait_for_previous()", name
                found += 1
    assert found >= 15


@pytest.mark.parametrize("target", [80, 89, ("hip", "gfx942")], ids=str)
def test_other_devices_refuse_and_launch_as_ever(target):
    with SimulatedGPU(target, execute=False), pytest.raises(RuntimeError, match=r"capability 9\.0"):
        dependent_launch(True)
    with SimulatedGPU(90, execute=False):
        dependent_launch(True)
    with SimulatedGPU(target, execute=False) as gpu:
        kernels.activation_bwd(torch.zeros(2, 16), None, "identity")
    assert not gpu.launches[0].dependent
    assert "griddepcontrol" not in str(gpu.launches[0].asm.get("ptx", ""))


def test_the_option_is_part_of_what_is_remembered():
    with Gpu(90) as gpu:
        assert one_launch(gpu)
        dependent_launch(True)
        assert one_launch(gpu)
        assert not one_launch(gpu)
        dependent_launch(False)
        assert not one_launch(gpu)
    assert ["'launch_pdl': True" in str(key) for key, *_ in gpu.made] == [False, True, True, False]


def test_remembered_launches_stay_dependent():
    with SimulatedGPU(90, execute=False) as gpu:
        for enabled in (False, True):
            dependent_launch(enabled)
            for _ in range(2):
                kernels.activation_bwd(torch.zeros(2, 16), None, "identity")
    assert [launch.dependent for launch in gpu.launches] == [False, False, True, True]
    assert ["griddepcontrol.wait" in launch.asm["ptx"] for launch in gpu.launches] == [False, False, True, True]


def test_a_graph_keeps_the_option_of_its_capture(monkeypatch):
    """So a step captures again when the option changes. What the graphs contain is no matter here."""
    monkeypatch.setattr(TritonStep, "_launch", lambda *_: None)
    with SimulatedCuda(90, execute=False):
        step = TrainStep(fastmlp.MLP((16, 4)), lr=0.1)
        for enabled in (False, True, False):
            dependent_launch(enabled)
            for _ in range(2):
                step(torch.zeros(8, 16), torch.zeros(8, dtype=torch.int64))
    entries = step._engine.graphs._entries.values()
    assert len(entries) == 2
    assert all(entry.graph is not None for entry in entries)
