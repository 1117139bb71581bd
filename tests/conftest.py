"""The lanes: how a kernel test reaches the kernel on this machine. tests/README.md describes the lanes.

Where there is a GPU, the kernel tests run on it. Without a GPU they run in Triton's interpreter if TRITON_INTERPRET=1,
which must be set before triton is imported, and otherwise on the simulated GPU, which executes the compiled PTX.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import fastmlp
from fastmlp.cpu import cache, choose, native
from fastmlp.cpu.native import machine_code
from tests.support.covering import SIMULATED, left_out

pytest_plugins = ["tests.fuzz.plugin", "tests.support.precision"]

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()
#: The markers of tests that use the kernels where kernels run, and plain torch elsewhere.
WITH_KERNELS = [pytest.mark.interpret] if INTERPRETING else [pytest.mark.gpu] if HAS_GPU else []
#: The markers of tests that ask for ``unsimulated``.
UNSIMULATED = pytest.mark.interpret if INTERPRETING else pytest.mark.gpu
#: The lanes that compile for other GPUs, or simulate one.
SIMULATING = ("compile", "launch", "execute", "placement")
#: GPU memory that one worker of pytest-xdist takes: its CUDA context, and the tensors of one test.
WORKER_BYTES = 2 << 30

if HAS_GPU:
    # `uninitialized_is_nan` makes torch deterministic, and cuBLAS refuses deterministic products without this setting.
    # cuBLAS reads it when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


ROOT = Path(__file__).resolve().parents[1]
#: Tests whose results depend on what the processor has: vector registers, 16-bit products, threads.
ON_THE_PROCESSOR = (
    "tests/cpu/test_choose.py",
    "tests/cpu/test_layers.py",
    "tests/cpu/test_processor.py",
    "tests/step/test_cpu_plan.py",
    "tests/cpu/test_threads.py",
    "tests/test_online.py",
    "tests/step/test_train_step.py",
    "tests/step/test_dtypes.py",
    "tests/step/test_ensemble_step.py",
    "tests/step/test_epoch.py",
    "tests/ops/test_torch_products.py",
    "tests/autograd/test_transforms.py",
    "tests/cpu/test_cache.py",
    "tests/whole/test_graphs.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="every case of the compile lane and of the grids, not only a set that covers them",
    )
    parser.addoption(
        "--lesser-cpu",
        action="store_true",
        help="only what depends on the processor: for a lesser processor, as make lesser-cpus simulates one",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Workers of pytest-xdist share the cores. One process alone has two threads, so that errors of threads show.
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))
    if HAS_GPU:
        # A machine with a GPU has its own versions of other packages, so their warnings are no errors. A warning
        # attributed to our modules remains an error, except a deprecation: torch attributes its own to the caller.
        kinds = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
        ours = [f"error:::{name}" for name in ("fastmlp", "bench", "tests")]
        for rule in ("default", *ours, *(f"default::{kind}" for kind in kinds)):
            config.addinivalue_line("filterwarnings", rule)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """`-n auto` on a GPU: one worker per core, as far as the GPU's free memory goes, and at most 16."""
    if not HAS_GPU or INTERPRETING:
        return None
    free, _ = torch.cuda.mem_get_info()
    return max(1, min(os.cpu_count() or 1, free // WORKER_BYTES, 16))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the simulating lanes where kernels are interpreted or there is a GPU; leave out a part of the grids."""
    if config.getoption("--lesser-cpu"):
        chosen = [item for item in items if item.path in {ROOT / path for path in ON_THE_PROCESSOR}]
        config.hook.pytest_deselected(items=list(set(items) - set(chosen)))
        items[:] = chosen
    if not config.getoption("--full"):
        unneeded = set(left_out(items))
        config.hook.pytest_deselected(items=list(unneeded))
        items[:] = [item for item in items if item not in unneeded]
    if INTERPRETING or HAS_GPU:
        interpreted = "TRITON_INTERPRET=1: nothing is compiled in this process"
        real = "there is a GPU: CUDA_VISIBLE_DEVICES= hides it from the lanes that simulate one"
        skip = pytest.mark.skip(reason=interpreted if INTERPRETING else real)
        for item in items:
            if any(item.get_closest_marker(name) for name in SIMULATING):
                item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the thousands of collected tests, which would take a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many kernels the compile lane compiled: distinct machine codes by target."""
    compiled = {
        value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == "compiled"
    }
    if compiled:
        counts = Counter(value.split()[0] for value in compiled)
        each = ", ".join(f"{target} {count}" for target, count in sorted(counts.items()))
        terminalreporter.write_line(f"compiled {len(compiled)} kernels to machine code: {each}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize every test that asks for ``lane`` by what this process can do."""
    if "lane" not in metafunc.fixturenames:
        return
    if HAS_GPU and not INTERPRETING:
        lanes = [pytest.param("gpu", marks=pytest.mark.gpu)]
    elif INTERPRETING:
        lanes = [pytest.param("interpret", marks=pytest.mark.interpret)]
    else:
        # Ragged shapes run on every architecture. All other tests run on one, since the code differs little.
        everywhere = (
            metafunc.config.getoption("full")
            or "shapes" in metafunc.function.__name__
            or metafunc.definition.get_closest_marker("everywhere")
        )
        archs = sorted(SIMULATED) if everywhere else [80]
        lanes = [pytest.param(f"sm_{arch}", marks=pytest.mark.execute) for arch in archs]
    metafunc.parametrize("lane", lanes, indirect=True)


@contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """``torch.empty`` returns NaN (the largest integer), so that reads of unwritten outputs and scratch memory show."""
    # torch fills new memory when its operations must be deterministic. (torch.use_deterministic_algorithms does the
    # same, but imports torch.compile.)
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Random numbers from the global generator depend on no other test."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def own_cpu_choices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Choices of libraries that tests measure under load stay out of the user's cache."""
    path = tmp_path_factory.mktemp("cache") / "cpu-gemm.json"

    def choices_path() -> Path:
        """A temporary file."""
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "choices_path", choices_path)
        cache.kept.cache_clear()
        yield path
    cache.kept.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def steps_on_operators(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Steps are those of an installation without numba, also where it is installed; ``native_code`` has its steps.

    Machine code is kept in a folder that the workers of one run share.
    """
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def installed() -> bool:
        """No."""
        return False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "installed", installed)
        patch.setattr(machine_code, "cache_folder", lambda: folder / "machine-code")
        yield


@pytest.fixture
def own_nodes() -> Iterator[None]:
    """Small networks on a CPU too go through fastmlp's nodes of the tape, where "auto" leaves them to torch's."""
    with fastmlp.use_backend("torch"):
        yield


@pytest.fixture
def native_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every training step that the machine code has is machine code."""
    pytest.importorskip("numba", exc_type=ImportError)
    monkeypatch.setattr(native, "installed", machine_code.installed)
    mode = choose.get_cpu_gemm()
    choose.set_cpu_gemm("native")
    yield
    choose.set_cpu_gemm(mode)


@pytest.fixture(autouse=True, scope="session")
def nothing_is_timed(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test depends on the fastest library of this machine: each runs once, and the first one is chosen.

    On lesser processors (``make lesser-cpus``) the last one is chosen.
    """
    place = -1 if request.config.getoption("lesser_cpu") else 0

    def fastest(candidates: dict[choose.Choice, Callable[[], object]]) -> choose.Choice:
        for run in candidates.values():
            run()
        return list(candidates)[place]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "_fastest", fastest)
        yield


@pytest.fixture(autouse=True, scope="session")
def no_tuned_tiles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests use the tiles of the rule, even if the user's cache has tiles for the simulated device."""
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from fastmlp.kernels import tuned

    folder = tmp_path_factory.mktemp("tiles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "table_path", lambda key: folder / f"{key}.json")
        yield


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """A test may replace what a launch depends on, and no launch of another test knows."""
    yield
    if "fastmlp.kernels.launch" in sys.modules:
        sys.modules["fastmlp.kernels.launch"].forget()


@pytest.fixture
def unsimulated() -> Iterator[torch.device]:
    """As ``lane``, for tests whose kernels another test runs on the simulated GPU: the interpreter, or a GPU."""
    if HAS_GPU and not INTERPRETING:
        yield torch.device("cuda")
    elif INTERPRETING:
        from tests.support.interpreter import bounds_checked

        with bounds_checked(), uninitialized_is_nan():
            yield torch.device("cpu")
    else:
        pytest.skip("needs Triton's interpreter or a GPU")


@pytest.fixture
def lane(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Makes Triton launches on tensors of the yielded device work: GPU, interpreter or simulated GPU.

    In the interpreter, every load and store is checked to be inside a tensor argument; the simulated GPU always checks
    that. On both, memory that was never written holds NaN.
    """
    name = request.param
    if name == "gpu":
        yield torch.device("cuda")
    elif name == "interpret":
        from tests.support.interpreter import bounds_checked

        with bounds_checked(), uninitialized_is_nan():
            yield torch.device("cpu")
    else:
        from tests.ptxsim import SimulatedGPU

        with SimulatedGPU(int(name.removeprefix("sm_"))), uninitialized_is_nan():
            yield torch.device("cpu")
