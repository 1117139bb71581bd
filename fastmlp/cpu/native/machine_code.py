"""Units of machine code: compiled once per machine, kept in files of the user's cache, called by their addresses.

numba compiles them. It can compile any loop, and its wheels bring the compiler, while torch.compile and AOTInductor
need a compiler of the system. To compile a unit takes a few tenths of a second. So the object files are kept, and later
processes load them with llvmlite alone, without importing numba. The name of a file has a hash of what the machine code
depends on: the sources, the versions and the processor. A file that is not whole is compiled anew. Where the folder
cannot be read or written, every process compiles for itself.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib
import importlib.util
import threading
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...base.atomic import atomic_write, cache_folder, read_file

DTYPES = (torch.float32, torch.float64)
_MOST_BYTES = 16 << 20
_HASH_BYTES = 32
#: Arguments of the units of a file: pointers to values in the dtype, to int64, float64, float32 and uint8; int64,
#: float64, and numbers in the dtype.
_ARGUMENTS = {
    "activations": "V i",
    "derivatives": "V V i",
    "losses": "V I V i i I i i i V V i I D",
    "row_weights": "V I V i i I i i i V V i I D",
    "dropout.dropped": "V V V i i i i d i i i i",
    "rules": "V V V V V i d d d d D",
    "products.product": "V i i V i i V i i i v i",
    "products.forward": "I V V V i V i i i i i",
    "backward.backward": "I D V i d i i",
    "backward.clipped": "I D V d i i",
    "backward.averaged": "I D V d i i",
    "whole.gathered": "V V B i i i I i i i",
    "whole.run": "I V",
    "whole.spread": "I V",
    "whole.members": "I i i i i i i i i i i",
}
#: The units of every step.
_ALWAYS = (
    "whole.run", "whole.spread", "whole.gathered", "backward.backward", "products.forward", "products.product",
)  # fmt: skip
#: Why there is no machine code, by dtype, where it could not be made.
_broken: dict[torch.dtype, str] = {}
#: Members of an ensemble may ask for a unit at once, each in its thread.
_loading = threading.Lock()
#: The machine code lives as long as these.
_engines: list[Any] = []


def _arguments(unit: str) -> list[str]:
    return (_ARGUMENTS.get(unit) or _ARGUMENTS[unit.partition(".")[0]]).split()


@functools.cache
def installed() -> bool:
    """Whether numba and llvmlite are there, and addresses have 64 bits."""
    found = all(importlib.util.find_spec(name) is not None for name in ("numba", "llvmlite"))
    return found and ctypes.sizeof(ctypes.c_void_p) == 8


def written(unit: str) -> bool:
    """Whether the unit's function is in its file, which is read and not imported, since it needs numba."""
    file, _, function = unit.partition(".")
    return function in _defined(file)


@functools.cache
def _defined(file: str) -> set[str]:
    """The functions and variables of a file of units."""
    tree = ast.parse((Path(__file__).parent / f"{file}.py").read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    return names | {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


class Units:
    """The addresses of units for tensors of one dtype.

    Attributes:
        run: ``whole.run``, a function of addresses, each a ``c_int64``: where its result and an error would go, and its
            two arguments.
        spread: ``whole.spread``, likewise.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._addresses: dict[str, int] = {}
        self.load(_ALWAYS)
        # Without ``argtypes``, arguments that are ``c_int64`` already are not converted at each call.
        self.run, self.spread = (ctypes.CFUNCTYPE(ctypes.c_int32)(self[f"whole.{name}"]) for name in ("run", "spread"))

    def load(self, names: Iterable[str]) -> None:
        """Load the units of these names, which are FILE.FUNCTION, or compile them."""
        for name in names:
            if name not in self._addresses:
                with _loading:
                    self._addresses[name] = self._addresses.get(name) or _loaded(name, self._dtype)

    def function(self, name: str) -> Callable[..., int]:
        """A unit as a function of addresses and whole numbers."""
        arguments = len(_arguments(name))
        return ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * (2 + arguments))(self[name])

    def __getitem__(self, name: str) -> int:
        return self._addresses[name]


def units(dtype: torch.dtype, names: Iterable[str]) -> Units | None:
    """The units that every step needs and those of ``names``; None where they cannot be compiled.

    The first call of a process loads them, and the first one on a machine compiles them. A warning says why that
    failed, once.
    """
    if dtype not in DTYPES or dtype in _broken or not installed():
        return None
    try:
        found = _units(dtype)
        found.load(names)
        return found
    except Exception as error:
        _broken[dtype] = f"{type(error).__name__}: {error}"
        warnings.warn(
            f"numba is installed but could not compile the training step ({_broken[dtype]}); steps run on torch's "
            "operators, which is slower for small networks. Reinstall it with pip install 'fastmlp[cpu]'",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


_units: Callable[[torch.dtype], Units] = functools.cache(Units)


def missing(dtype: torch.dtype) -> str:
    """Why there is no machine code for ``dtype``."""
    if dtype not in DTYPES:
        return f"compiled steps compute in float32 or float64, not in {dtype}"
    if not installed():
        return "numba is not installed; install it with pip install 'fastmlp[cpu]'"
    return f"numba could not compile the step: {_broken.get(dtype, 'unknown')}"


def _loaded(unit: str, dtype: torch.dtype) -> int:
    """The address of a unit."""
    from llvmlite import binding

    path = _path(unit, dtype)
    found = _read(path)
    if found is None:
        found = _compiled(unit, dtype)
        with contextlib.suppress(OSError):
            atomic_write(path, _packed(*found))
    name, code = found
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple().create_target_machine(jit=True)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), target)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return engine.get_function_address(name)


@functools.cache
def _depends() -> str:
    """A hash of what all machine code depends on."""
    from llvmlite import binding

    parts = [version("numba"), version("llvmlite"), binding.get_host_cpu_name()]
    parts.append(binding.get_host_cpu_features().flatten())
    parts += [source.read_text(encoding="utf-8") for source in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _path(unit: str, dtype: torch.dtype) -> Path:
    """The file of a unit, which need not exist."""
    return cache_folder() / "native" / f"{unit}-{str(dtype).removeprefix('torch.')}-{_depends()}.o"


def _packed(name: str, code: bytes) -> bytes:
    """The file's content: a hash of the rest, the function's name and a line's end, the object file."""
    rest = name.encode() + b"\n" + code
    return hashlib.sha256(rest).digest() + rest


def _read(path: Path) -> tuple[str, bytes] | None:
    """The function's name and the object file; None where there is no whole file."""
    try:
        content = read_file(path, _MOST_BYTES)
    except OSError:
        return None
    rest = content[_HASH_BYTES:]
    if hashlib.sha256(rest).digest() != content[:_HASH_BYTES]:
        return None
    name, _, code = rest.partition(b"\n")
    return name.decode(), code


def _compiled(unit: str, dtype: torch.dtype) -> tuple[str, bytes]:
    """The function's name and the object file, from numba."""
    from numba import njit, types

    from .pointers import OPTIONS

    file, _, function = unit.partition(".")
    own = types.float32 if dtype == torch.float32 else types.float64
    kinds = {"V": own, "I": types.int64, "D": types.float64, "F": types.float32, "B": types.uint8}
    of = {letter: types.CPointer(kind) for letter, kind in kinds.items()}
    of |= {"i": types.int64, "d": types.float64, "v": own}
    arguments = tuple(of[letter] for letter in _arguments(unit))
    source = getattr(importlib.import_module(f".{file}", __package__), function)
    collects = gc.isenabled()
    gc.disable()  # numba makes many objects and keeps them: a third of the time would go into looking for garbage
    try:
        dispatcher = njit(arguments, **OPTIONS)(source)
    finally:
        if collects:
            gc.enable()
    (result,) = dispatcher.overloads.values()
    return result.fndesc.llvm_func_name, result.library._get_compiled_object()
