"""Steps of several processes against one process that has the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import fastmlp
from fastmlp import TrainStep

ROOT = Path(__file__).parents[2]
#: Four processes, which a script forks after it has loaded torch. Every process runs all checks.
SCRIPT = """
import os, sys, tempfile, traceback
import torch, torch.distributed as dist
import fastmlp
from fastmlp import TrainStep, set_backend
from tests.step.data_parallel_checks import CHECKS

torch.set_num_threads(1)
folder = tempfile.mkdtemp()
backend, names = sys.argv[1], sys.argv[2:]

def main(rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    pair = dist.new_group([0, 1])
    set_backend(backend)
    for name in names:
        CHECKS[name](rank, pair)
    dist.barrier()
    dist.destroy_process_group()

children = []
for rank in range(4):
    child = os.fork()
    if not child:
        try:
            main(rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def run(backend: str, *names: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, *names],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


def test_processes_together_do_what_one_does():
    run(
        "torch",
        "steps",
        "unequal_parts",
        "weights",
        "epochs",
        "gradients",
        "overflow",
        "frozen",
        "dropout",
        "differences",
        "dtypes",
        "nothing_counts",
        "ensembles",
    )


@pytest.mark.interpret
def test_on_the_kernels():
    run("triton", "gradients", "overflow", "dropout", environment={"TRITON_INTERPRET": "1"})


@pytest.mark.interpret
def test_ensembles_on_the_kernels(request):
    if not request.config.getoption("--full"):
        pytest.skip("takes seconds in each of four processes; --full runs it")
    run("triton", "small_ensembles", environment={"TRITON_INTERPRET": "1"})


def test_a_process_that_dies_ends_the_others():
    script = SCRIPT.replace("CHECKS[name](rank, pair)", "CHECKS[name](rank, pair)\n        assert rank != 3, 'gone'")
    done = subprocess.run(
        [sys.executable, "-c", script, "torch", "steps", "steps"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.count("RuntimeError") >= 3, done.stderr


def test_a_group_that_does_not_fit_is_refused(tmp_path):
    model = fastmlp.MLP((4, 3))
    with pytest.raises(RuntimeError, match="init_process_group"):
        TrainStep(model, process_group="gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match=r"torch\.distributed\.group\.WORLD, got str"):
            TrainStep(model, process_group="gloo")
        with pytest.raises(ValueError, match="not in the process_group"):
            TrainStep(model, process_group=dist.GroupMember.NON_GROUP_MEMBER)
        step = TrainStep(model, process_group=dist.group.WORLD)
        with pytest.raises(ValueError, match="at least one row in every process"):
            step(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            step.__reduce__()
        with pytest.raises(TypeError, match="train the MLP itself with TrainStep"):
            TrainStep(torch.nn.parallel.DistributedDataParallel(model))
    finally:
        dist.destroy_process_group()
