"""Every case compiles, and its machine code keeps the limits."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable

import pytest
from triton.runtime.jit import JITFunction

from fastmlp import kernels
from fastmlp.kernels.configs import Tile

from . import limits
from .cases import FAMILIES, HOT, SIBLINGS, Case, covering, full, registry
from .machine_code import digest, disassemble, instructions, nvidia_tool
from .targets import TARGETS

pytestmark = pytest.mark.compile


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases of one kernel for one target are one test, because their machine code is read together."""
    if "cases" in metafunc.fixturenames:
        groups: defaultdict[str, list[Case]] = defaultdict(list)
        for case in full() if metafunc.config.getoption("--full") else covering():
            groups[f"{case.target.name}/{case.kernel}"].append(case)
        metafunc.parametrize("cases", groups.values(), ids=groups)


def test_limits(cases: list[Case], record_property: Callable[[str, object], None]) -> None:
    """Every case is compiled by Triton's JIT and the target's assembler, then inspected."""
    launched = {case: case.run() for case in cases}
    disassemble(launch for launches in launched.values() for launch in launches)
    problems = []
    for case, launches in launched.items():
        assert {launch.name for launch in launches} <= set(case.entry.kernels)
        allowed = limits.exceptions_for(case)
        for launch in launches:
            record_property("compiled", f"{case.target.name} {digest(launch)}")
            if case.tf32 and launch.name in case.entry.gemm:
                assert launch.constexprs["INPUT_PRECISION"] == "tf32"
            for limit, what in limits.violations(case, launch).items():
                if limit not in allowed:
                    problems.append(f"{case.name}: {launch.name}: {limits.LIMITS[limit]}: {what}")
    assert not problems, "\n".join(problems)


def test_instructions_are_those_of_the_cubins() -> None:
    """Kernels read end to end give the same instructions as nvdisasm gives for each cubin alone."""
    for target in TARGETS.values():
        if target.backend == "cuda":
            launches = [
                launch
                for case in covering()
                if case.target is target and case.kernel in ("activation_bwd", "reduce_update")
                for launch in case.run()
            ]
            disassemble(launches)
            launch = launches[len(launches) // 2]
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(launch.asm["cubin"])
                file.flush()
                command = [nvidia_tool("nvdisasm"), "-c", "-json", file.name]
                functions = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)[1]
            names = [i["opcode"].split(".")[0] for function in functions for i in function["sass-instructions"]]
            assert Counter(names) == instructions(launch).counts, target.name


@pytest.mark.parametrize("exception", limits.EXCEPTIONS, ids=lambda exception: f"{exception.limit}-{exception.cases}")
def test_every_exception_is_needed(exception: limits.LimitException) -> None:
    witness = next((case for case in full() if case.name == exception.witness), None)
    assert witness is not None, f"no case is named {exception.witness}: choose another witness, or remove the exception"
    assert exception.limit in limits.exceptions_for(witness)
    found = {limit for launch in witness.run() for limit in limits.violations(witness, launch)}
    assert exception.limit in found, f"{exception.witness} keeps the limit: choose another witness, or remove it"


def test_every_kernel_is_compiled() -> None:
    """Every launched @triton.jit function is in the table, so a new kernel needs cases."""
    written = set()
    for module in pkgutil.iter_modules(kernels.__path__):
        for name, value in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).items():
            if isinstance(value, JITFunction) and name.startswith("_") and name.endswith("_kernel"):
                written.add(name)
    assert written == {name for entry in registry().values() for name in entry.kernels}


def test_every_launcher_is_in_the_table() -> None:
    # The launchers of networks launch kernels of others, and Dropout is an argument of launchers.
    assert set(kernels.__all__) - {"network_bwd", "network_fwd", "Dropout"} <= set(registry())


def test_the_covering_set_covers() -> None:
    """Every tile is in the set for every target and operand size, every variant for every target, and no case twice.

    The siblings of a target have some cases of each kernel.
    """
    everything, chosen = list(full()), list(covering())
    assert len({case.name for case in chosen}) == len(chosen)
    assert {case.name for case in chosen} <= {case.name for case in everything}
    assert {(case.target.name, case.kernel) for case in chosen} == {(c.target.name, c.kernel) for c in everything}
    everything, chosen = ([c for c in cases if c.target.name not in SIBLINGS] for cases in (everything, chosen))
    for entry, key in (
        ("variants", lambda c: (c.target.name, c.kernel, c.variant)),
        ("dtypes", lambda c: (c.target.name, c.kernel, c.dtype)),
        ("tiles", lambda c: (c.target.name, c.kernel, c.tile, isinstance(c.tile, Tile) and c.dtype.itemsize)),
    ):
        assert {key(c) for c in chosen} == {key(c) for c in everything}, entry
    hot = Counter(c.target.name for c in chosen if c.kernel in HOT and c.variant == next(iter(c.entry.variants)))
    for name in FAMILIES:
        tiles = {
            (c.kernel, c.dtype.itemsize, c.tile)
            for c in everything
            if c.kernel in HOT and c.target.name == name and c.variant == next(iter(c.entry.variants))
        }
        assert hot[name] >= len(tiles), name
