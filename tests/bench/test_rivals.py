"""Contenders that need a GPU to run completely: captured steps, the compiled whole step, TrainKernel."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from bench.measure.gate import judge
from bench.measure.runner import prepare
from bench.presets import NAMES, Case, preset
from bench.problems import GATE_CALLS, EpochProblem, MembersProblem, OnlineProblem, StepProblem
from bench.rivals import rivals_for
from bench.rivals.cuda_graph import CudaGraph
from bench.rivals.eager import Eager
from bench.rivals.train_kernel import TrainKernel
from bench.rivals.vmap import VmapCompiledRun
from bench.rivals.whole import WholeStep, WholeStepRun
from tests.support.steps import one_thread  # noqa: F401

SIZES = (20, 16, 12, 5)
#: Every way to take steps, and every optimizer.
TRAINING = [
    StepProblem(SIZES, 32),
    StepProblem(SIZES, 32, optimizer="nesterov"),
    StepProblem(SIZES, 32, optimizer="adamw"),
    StepProblem(SIZES, 32, dtype="bfloat16"),
    StepProblem(SIZES, 32, "relu", loss="mse", dtype="bfloat16", optimizer="adamw"),
    StepProblem(SIZES, 32, "gelu", bias=False),
    OnlineProblem(SIZES, samples=6),
    EpochProblem(SIZES, 8, steps=4, optimizer="nesterov"),
]


def verdict(problem, run, calls=GATE_CALLS):
    """The gate's verdict on a run after its calls."""
    for _ in range(calls):
        run()
    return judge(problem, run.results())


@pytest.mark.parametrize("problem", [TRAINING[4], TRAINING[7]], ids=lambda problem: problem.name)
@pytest.mark.parametrize("name", ["fastmlp", "eager", "eager_fused"])
def test_squared_errors_and_epochs_are_trained_rightly(problem, name):
    (rival,) = (rival for rival in rivals_for(problem) if rival.name == name)
    entry, run = prepare(rival, Case(problem))
    assert (entry["status"], entry["reason"]) == ("ok", "")
    assert run is not None


def test_gate_notices_another_order_another_loss_and_a_missing_step():
    epoch, mse = EpochProblem(SIZES, 8, steps=4), StepProblem(SIZES, 32, "relu", loss="mse")
    right = epoch.oracle(torch.float32)
    assert judge(epoch, right).passed

    class OtherOrder(EpochProblem):
        def batches(self):
            return list(reversed(super().batches()))

    class OneLess(EpochProblem):
        def batches(self):
            return super().batches()[:-1]

    for other in (OtherOrder, OneLess):
        assert not judge(epoch, other(SIZES, 8, steps=4).oracle(torch.float32)).passed
    assert judge(mse, mse.oracle(torch.float32)).passed
    half = {name: (value + start) / 2 for (name, value), start in zip(right.items(), mse.parameters(), strict=True)}
    assert not judge(mse, half).passed


@pytest.mark.parametrize(("fused", "chosen"), [(False, None), (True, True)])
def test_eager_leaves_the_way_of_the_update_to_torch(fused, chosen):
    """fused=False would also forbid foreach, which torch chooses on a GPU."""
    run = Eager(fused=fused).build(TRAINING[0])
    assert (run.optimizer.defaults["fused"], run.optimizer.defaults["foreach"]) == (chosen, None)


# Captured steps, on a stand-in for torch's CUDA graphs


class PlayedGraph(TorchDispatchMode):
    """A stand-in for torch.cuda.CUDAGraph that records the operators of a step with their tensors and repeats them.

    As in a real graph, numbers keep their values of the capture, and results appear in the tensors of the capture.
    """

    def __init__(self):
        super().__init__()
        self.recorded = []

    @classmethod
    def is_infra_mode(cls):
        """Compiled code runs as compiled under an infra mode; under other modes Dynamo refuses to run it."""
        return True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        kept = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, out))
        self.recorded.append((func, *kept))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, kept in self.recorded:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(kept), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """The captured graphs. torch.cuda's streams and graphs are replaced by stand-ins on the CPU."""
    captured = []

    @contextmanager
    def capture(graph):
        with graph:
            yield
        captured.append(graph)

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": PlayedGraph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return captured


@pytest.mark.parametrize("problem", TRAINING, ids=lambda problem: problem.name)
def test_eager_captured_whole_trains_as_eager_does(problem, graphs):
    run = CudaGraph().build(problem)
    before = [p.detach().clone() for p in run.params]
    assert all(map(torch.equal, before, problem.parameters())), "the capture left a trace"
    found = verdict(problem, run)
    assert found.passed, str(found)
    assert len(graphs) == 1


def test_the_update_is_in_the_graph_and_counts_there(graphs):
    run = CudaGraph().build(TRAINING[2])
    verdict(TRAINING[2], run)
    assert {state["step"].item() for state in run.optimizer.state.values()} == {GATE_CALLS}
    assert any(func is torch.ops.aten._fused_adamw_.default for func, *_ in graphs[0].recorded)


@pytest.mark.parametrize(
    ("problem", "graph"),
    [*((problem, True) for problem in TRAINING), (TRAINING[2], False), (TRAINING[7], False)],
    ids=lambda value: getattr(value, "name", {True: "captured", False: "called"}.get(value)),
)
def test_the_whole_step_is_one_graph_of_the_compiler_and_right(problem, graph, graphs):
    counters.clear()
    run = WholeStepRun(problem, backend="aot_eager", graph=graph)
    found = verdict(problem, run)
    assert found.passed, str(found)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert len(graphs) == graph


@pytest.mark.parametrize(("optimizer", "graph"), [("adamw", True), ("sgd", False)])
def test_the_mapped_step_is_one_graph_of_the_compiler_and_right(optimizer, graph, graphs):
    counters.clear()
    problem = MembersProblem(SIZES, 8, optimizer=optimizer, members=3)
    found = verdict(problem, VmapCompiledRun(problem, backend="aot_eager", graph=graph))
    assert found.passed, str(found)
    assert counters["stats"]["unique_graphs"] == 1
    assert len(graphs) == graph


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="Inductor writes vector code although torch is told to use none, and g++ refuses that code",
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_inductor_compiles_the_whole_step(optimizer):
    counters.clear()
    problem = StepProblem(SIZES, 32, optimizer=optimizer)
    entry, _ = prepare(WholeStep("default"), Case(problem))
    assert (entry["status"], entry["reason"]) == ("ok", "")
    assert counters["stats"]["unique_graphs"] == 1


def test_where_the_whole_step_does_not_run():
    tuned = WholeStep("max-autotune-no-cudagraphs")
    assert (tuned.name, tuned.label) == ("whole_max_autotune", "whole step compiled (max-autotune)")
    assert not tuned.available(TRAINING[0]).ok
    assert tuned.available(StepProblem(SIZES, 32, device="cuda:0")).ok
    assert not WholeStep("default").available(StepProblem(SIZES, 32, dtype="float16")).ok


@pytest.mark.parametrize("name", NAMES)
def test_presets_of_a_gpu_have_the_strongest_opponents(name):
    cases = preset(name, "cuda:0").cases
    for case in (case for case in cases if case.problem.kind in ("step", "online", "epoch")):
        contenders = {rival.name for rival in rivals_for(case.problem)} - case.leave_out
        assert {"cuda_graph", "whole_default"} <= contenders, case.problem.name
        assert name in ("full", "scaling", "online") or "whole_max_autotune" not in contenders
    if name in ("quick", "full"):
        assert any(case.problem.kind == "epoch" for case in cases)
        fits = [case for case in cases if getattr(case.problem, "loss", "") == "mse" and "relu" in case.problem.name]
        assert fits
        assert not any("trainkernel" in case.leave_out for case in fits)


def test_short_presets_of_a_cpu_compile_no_whole_step():
    for name in ("quick", "scaling", "online"):
        assert all("whole_default" in case.leave_out for case in preset(name, "cpu").cases)
    assert not any("whole_default" in case.leave_out for case in preset("full", "cpu").cases)


# TrainKernel, replaced by a stand-in with its documented interface


def played_trainkernel(in_place: bool) -> ModuleType:
    """A package that runs the step uncompiled. With ``in_place`` it uses the given tensors and a replay overwrites the
    old state; otherwise it uses copies and a replay only returns the new state."""

    def compile_training(step, examples):
        def capture(state, x, y):
            if not in_place:
                state, x, y = tuple(p.clone() for p in state), x.clone(), y.clone()
            outputs = tuple(tuple(t.clone() for t in o) if isinstance(o, tuple) else o for o in step(state, x, y))
            outputs = (*outputs[:2], state) if in_place else outputs

            def replay() -> Any:
                for old, new in zip(outputs[2], step(state, x, y)[2], strict=True):
                    old.copy_(new)
                return outputs

            return SimpleNamespace(inputs=(state, x, y), outputs=outputs, replay=replay)

        step(*examples)
        return SimpleNamespace(capture=capture)

    module = ModuleType("trainkernel")
    module.compile_training = compile_training  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    "problem",
    [
        StepProblem(SIZES, 32, "relu", loss="mse"),
        StepProblem(SIZES, 32, "relu", loss="mse", dtype="bfloat16"),
        EpochProblem(SIZES, 8, "relu", loss="mse", steps=4),
    ],
    ids=lambda problem: problem.name,
)
def test_trainkernel_through_its_documented_interface(problem, in_place, monkeypatch):
    monkeypatch.setitem(sys.modules, "trainkernel", played_trainkernel(in_place))
    inputs = [tuple(t.clone() for t in s) for s in problem.on_device()]
    found = verdict(problem, TrainKernel().build(problem))
    assert found.passed, str(found)
    for kept, now in zip(inputs, problem.on_device(), strict=True):
        assert all(map(torch.equal, kept, now)), "the inputs that contenders share were changed"


def test_trainkernel_says_why_it_does_not_run(monkeypatch):
    def reason(problem):
        return TrainKernel().available(problem).reason

    fits = {"activation": "relu", "loss": "mse", "device": "cuda:0"}
    assert reason(StepProblem(SIZES, 32, **fits)) == "not installed"
    module = played_trainkernel(True)
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "trainkernel", module)
    assert reason(StepProblem(SIZES, 32)) == "has no softmax"
    assert reason(StepProblem(SIZES, 32, loss="mse")) == "has relu only"
    assert reason(StepProblem(SIZES, 32, optimizer="adamw", **fits)) == "has plain SGD only"
    assert reason(StepProblem(SIZES, 32, dtype="float16", **fits)) == "written without a loss scale"
    assert reason(StepProblem(SIZES, 32, **{**fits, "device": "cpu"})) == "needs a GPU"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason(StepProblem(SIZES, 32, **fits)) == "needs nvcc and a GPU from sm_80 on"
