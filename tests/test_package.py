"""The package as a whole: the cost and needs of an import, the public names, and the places of kernels."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmlp
from fastmlp import reference
from fastmlp.activations import ACTIVATIONS, LEAKY_SLOPE
from fastmlp.backend import triton_available

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for folder in ("fastmlp", "kernels", "bench", "tests") for p in (ROOT / folder).rglob("*.py"))
needs_triton = pytest.mark.skipif(not triton_available(), reason="triton is not installed")


def python(code: str, **env: str) -> str:
    """The standard output of a fresh interpreter that runs ``code`` with warnings as errors in fastmlp."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_TRITON = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name.startswith("triton") else find_spec(name, package)
sys.meta_path.insert(0, Block())
"""


def test_works_without_triton():
    """On macOS and Windows plain torch does everything, and an error says what the kernels need."""
    out = python(
        WITHOUT_TRITON
        + """
import torch, fastmlp

model = fastmlp.MLP((8, 7, 6, 5), "gelu")
for backend in ("auto", "torch"):
    with fastmlp.use_backend(backend):
        model(torch.randn(3, 8)).sum().backward()
assert all(p.grad is not None for p in model.parameters())
for choose in (fastmlp.set_backend, lambda name: fastmlp.use_backend(name).__enter__()):
    try:
        choose("triton")
    except RuntimeError as error:
        print(error)
assert fastmlp.get_backend() == "auto"
assert not any(name.partition(".")[0] == "triton" for name in sys.modules)
"""
    )
    assert out.count("the package triton is not installed") == 2
    assert out.count("pip install triton") == 2


def test_the_test_blocks_triton():
    """If triton could be imported, the test above would prove nothing."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON + "import triton"], capture_output=True, text=True, cwd=ROOT
    )
    assert "ModuleNotFoundError: No module named 'triton'" in done.stderr


def test_import_is_light():
    """A user of the kernels or the modules does not wait for plots, data sets, compilers and the command line."""
    heavy = ("triton", "torchvision", "matplotlib", "PIL", "rich", "click", "torch._dynamo", "fastmlp.kernels")
    names = python("import sys, fastmlp; print('\\n'.join(sys.modules))").split()
    assert [name for name in heavy if name in names] == []


def test_a_bare_checkout_needs_no_installation(tmp_path):
    """With no environment, no installed fastmlp and no home, the package and its kernels come from the checkout."""
    for name in ("fastmlp", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    # Without `-S` the editable installation of this environment would supply the files that the checkout does not.
    paths = [str(tmp_path), *(p for p in sys.path if p.endswith("-packages"))]
    code = f"""
import sys
sys.path[:0] = {paths!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "platformdirs":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import fastmlp
print(fastmlp.__file__)
if {triton_available()}:
    import fastmlp.kernels.wgrad_update as kernel
    print(kernel.__file__)
    from fastmlp.kernels.tuned import table_path
    assert table_path("x").name == "x.json"
"""
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env={}, cwd="/")
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert files == [str(tmp_path / name) for name in ("fastmlp/__init__.py", "kernels/wgrad_update.py")][: len(files)]


def test_import_changes_nothing_global():
    """An import changes neither torch's settings nor the random number generators nor the environment."""
    python(
        """
import os, random, torch
import numpy as np

def state():
    return (
        torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32, torch.get_default_dtype(),
        torch.get_num_threads(), torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), dict(os.environ),
    )

before = state()
import fastmlp
assert state() == before
"""
    )


class TestSources:
    """Rules of the layout, read from the source files."""

    @staticmethod
    def imports(path: Path) -> list[str]:
        """Every absolute module name that the file imports."""
        names = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module or "")
        return names

    def test_there_are_sources(self):
        assert {p.parent.name for p in SOURCES} >= {"fastmlp", "kernels", "tests"}

    def test_kernels_are_imported_as_fastmlp_kernels(self):
        """``import kernels`` from the checkout would load second copies of every module."""
        wrong = [p for p in SOURCES if any(name.partition(".")[0] == "kernels" for name in self.imports(p))]
        assert wrong == []
        text = [p for p in SOURCES if re.search(r"import_module\(['\"]kernels|__import__\(['\"]kernels", p.read_text())]
        assert text == []

    def test_kernels_import_each_other_relatively(self):
        wrong = {p.name: self.imports(p) for p in SOURCES if p.parent == ROOT / "kernels"}
        assert [p for p, names in wrong.items() if any(n.startswith("fastmlp") for n in names)] == []

    @staticmethod
    def jitted(path: Path) -> list[str]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        return [
            node.name
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and any(ast.unparse(d).startswith(("triton.jit", "jit", "triton.autotune")) for d in node.decorator_list)
        ]

    def test_only_kernels_has_triton_code(self):
        assert [p for p in SOURCES if p.is_relative_to(ROOT / "fastmlp") and self.jitted(p)] == []
        assert sum(len(self.jitted(p)) for p in SOURCES if p.is_relative_to(ROOT / "kernels")) > 0

    def test_kernel_names(self):
        """A launched kernel is private and ends in _kernel; code that kernels share is a plain device function."""
        for path in SOURCES:
            if path.parent == ROOT / "kernels":
                source = path.read_text(encoding="utf-8")
                launched = set(re.findall(r"(\w+)\[\(", source)) & set(self.jitted(path))
                assert [name for name in launched if not re.fullmatch(r"_\w+_kernel", name)] == []

    def test_kernels_know_nothing_of_autograd(self):
        for path in SOURCES:
            if path.parent == ROOT / "kernels":
                assert "autograd.Function" not in path.read_text(encoding="utf-8")
                assert "save_for_backward" not in path.read_text(encoding="utf-8")

    def test_triton_is_never_imported_at_the_top_of_fastmlp(self):
        """Imports of triton are inside functions, so that the package can be imported where triton does not exist.

        ``step/triton_step.py`` is itself imported in a function, once the kernels are to run the step, and imports
        ``step/late_update.py`` and ``step/triton_loss.py``.
        """
        apart = ("triton_step.py", "triton_launches.py", "late_update.py", "triton_loss.py")
        for path in (p for p in SOURCES if p.is_relative_to(ROOT / "fastmlp") and p.name not in apart):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or "", *(alias.name for alias in node.names)]
                else:
                    continue
                assert not any(n.partition(".")[0] in ("triton", "kernels") for n in names), path

    def test_every_kernel_file_has_its_test(self):
        """kernels/<stem>.py with a launcher is tested by tests/kernels/test_<stem>.py."""
        for path in SOURCES:
            if path.parent == ROOT / "kernels" and re.search(r"_kernel\[", path.read_text(encoding="utf-8")):
                assert (ROOT / "tests" / "kernels" / f"test_{path.name}").is_file(), path.name


#: The modules of the machine code, which are only imported to be compiled.
COMPILED = [
    f"fastmlp.cpu.native.{name}"
    for name in ("activations", "losses", "pointers", "products", "rules", "tiles", "whole")
]


def modules() -> list[str]:
    names = [m.name for m in pkgutil.walk_packages(fastmlp.__path__, "fastmlp.")]
    return ["fastmlp", *(n for n in names if not n.endswith("__main__"))]


@pytest.mark.parametrize("name", modules())
def test_public_names(name):
    """Each module is documented, names its public objects, has them, and documents every public class and function."""
    if name.startswith("fastmlp.kernels") and not triton_available():
        pytest.skip("triton is not installed")
    if name in COMPILED and importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed")
    module = importlib.import_module(name)
    assert module.__doc__
    public = getattr(module, "__all__", [])
    assert len(set(public)) == len(public)
    for attribute in public:
        value = getattr(module, attribute)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{name}.{attribute} has no docstring"


def test_the_public_interface():
    modules = {"MLP", "Linear", "functional", "get_backend", "reference", "set_backend", "use_backend"}
    training = {"TrainStep", "fit", "load_data", "load_fashion_mnist", "load_checkpoint", "save_checkpoint"}
    assert modules | training <= set(fastmlp.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", fastmlp.__version__)
    assert f'\nversion = "{fastmlp.__version__}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a checkout that is not installed
        assert importlib.metadata.version("fastmlp") == fastmlp.__version__


@pytest.mark.parametrize(
    "function",
    [
        fastmlp.functional.linear_act,
        fastmlp.functional.mlp,
        fastmlp.MLP,
        fastmlp.Linear,
        fastmlp.fit,
        fastmlp.load_data,
    ],
)
def test_docstrings_name_every_argument(function):
    documented = inspect.getdoc(function)
    assert documented is not None
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", documented), parameter


def test_typed():
    """py.typed lies beside the installed package, so type checkers read the annotations."""
    assert (Path(fastmlp.__file__).parent / "py.typed").is_file()
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'fastmlp = \[.*"py.typed"', pyproject)


@needs_triton
class TestActivations:
    """The table, the reference and the device functions have the same set of activations."""

    def test_device_functions_know_the_same_names(self):
        source = ast.parse((ROOT / "kernels" / "activations.py").read_text(encoding="utf-8"))
        for function in ("activate", "activation_grad"):
            (definition,) = (n for n in source.body if isinstance(n, ast.FunctionDef) and n.name == function)
            compared = {
                n.comparators[0].value
                for n in ast.walk(definition)
                if isinstance(n, ast.Compare) and isinstance(n.comparators[0], ast.Constant)
                if isinstance(n.comparators[0].value, str)
            }
            assert compared == set(ACTIVATIONS)

    def test_the_same_constants(self):
        from fastmlp.kernels import activations

        assert activations.LEAKY_SLOPE.value == LEAKY_SLOPE

    def test_the_same_values(self):
        """Every device function against the reference, forward and backward, in the interpreter."""
        python(
            """
import torch
from fastmlp import reference
from fastmlp.activations import ACTIVATIONS, saved_for_grad
from fastmlp.kernels import activation_bwd, linear_fwd

z = torch.linspace(-6, 6, 97)[:, None]
one = torch.ones(1, 1)
for name in ACTIVATIONS:
    a, _ = linear_fwd(z, one, None, name)
    expected = reference.activate(z.double(), name)
    torch.testing.assert_close(a.double(), expected, rtol=1e-6, atol=1e-6)
    saved = {"a": a, "z": z.contiguous(), None: None}[saved_for_grad(name)]
    dz = activation_bwd(torch.ones_like(z), saved, name)
    torch.testing.assert_close(dz.double(), reference.activation_grad(z.double(), name), rtol=1e-5, atol=1e-6)
""",
            TRITON_INTERPRET="1",
        )


def test_the_reference_knows_every_activation():
    z = torch.linspace(-2, 2, 5)
    for name in ACTIVATIONS:
        assert reference.activate(z, name).shape == z.shape
        assert reference.activation_grad(z, name).shape == z.shape
