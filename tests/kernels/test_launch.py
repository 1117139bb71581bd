"""A remembered launch is the launch that Triton's binder would make: the same compiled kernel, grid and arguments.

Nothing is compiled here. What stands for a compiled kernel has Triton's key, which names all that Triton compiles for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import INTERPRETING

if INTERPRETING:
    pytest.skip("the interpreter has no launches to remember", allow_module_level=True)

from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

import fastmlp
from fastmlp import kernels
from fastmlp.kernels import configs, launch
from fastmlp.kernels.network import network_bwd, network_fwd
from tests.ptxsim import SimulatedGPU
from tests.support.negated import negated
from tests.support.precision import set_matmul

pytestmark = [pytest.mark.launch, pytest.mark.usefixtures("default_precision")]

TARGETS = [80, 90, 100, ("hip", "gfx942")]
DTYPES = [torch.float32, torch.bfloat16]


class Gpu(SimulatedGPU):
    """Records what is launched, and compiles nothing; ``asked`` counts the launches through Triton's binder."""

    def __init__(self, arch: Any) -> None:
        super().__init__(arch, execute=False)
        self._device += 700
        self.made: list[tuple[Any, ...]] = []
        self.asked = 0
        self._kernels: set[tuple[JITFunction[Any], int]] = set()

    def __enter__(self) -> Gpu:
        super().__enter__()
        self._patch = pytest.MonkeyPatch()
        run = JITFunction.run

        def compile_nothing(kernel: JITFunction[Any], key: Any, *options: Any) -> CompiledKernel:
            compiled = object.__new__(CompiledKernel)
            compiled.module = compiled.function = compiled.packed_metadata = None
            compiled.name, compiled.src = kernel.__name__, None
            compiled._run = lambda x, y, z, *rest: self.made.append((key, (x, y, z), rest[6:]))
            kernel.device_caches[self._device][0][key] = compiled
            self._kernels.add((kernel, self._device))
            return compiled

        def counted(kernel: JITFunction[Any], *args: Any, **options: Any) -> Any:
            self.asked += 1
            return run(kernel, *args, **options)

        self._patch.setattr(JITFunction, "_do_compile", compile_nothing)
        self._patch.setattr(JITFunction, "run", counted)
        self._patch.setattr(CompiledKernel, "_init_handles", lambda compiled: None)
        return self

    def __exit__(self, *error: Any) -> None:
        for kernel, device in self._kernels:
            del kernel.device_caches[device]
        self._patch.undo()
        super().__exit__(*error)


@contextmanager
def nothing_remembered() -> Iterator[None]:
    with (
        mock.patch.object(launch, "_memories", WeakKeyDictionary()),
        mock.patch.object(launch, "_latest", (lambda: None, None)),
    ):
        yield


def plain(value: Any, given_tensors: list[Tensor]) -> Any:
    """An argument by what a kernel sees of it; where a tensor of the caller lies, and what a new tensor is."""
    if isinstance(value, Tensor):
        address = value.data_ptr() if any(value is t or value.data_ptr() == t.data_ptr() for t in given_tensors) else 0
        return address, value.dtype, value.shape, value.stride()
    if isinstance(value, tuple):
        return tuple(plain(v, given_tensors) for v in value)
    return value.hex() if isinstance(value, float) else value


def same_as_the_binder(gpu: Gpu, function: Any, tensors: list[Tensor]) -> int:
    """Launch, compare with a launch of which nothing is remembered; returns how often Triton was asked at first."""
    gpu.made, gpu.asked = [], 0
    function()
    asked, made = gpu.asked, gpu.made
    gpu.made = []
    with nothing_remembered():
        function()
    assert len(made) == len(gpu.made) > 0
    for got, expected in zip(made, gpu.made, strict=True):
        assert got[0] == expected[0]
        assert got[1] == expected[1]
        assert plain(got[2], tensors) == plain(expected[2], tensors)
    return asked


@st.composite
def matrices(draw: st.DrawFn, rows: int, cols: int, dtype: torch.dtype, *, dense: bool = False) -> Tensor:
    """A view with any alignment and, unless ``dense``, strides."""
    offset = draw(st.sampled_from([0, 0, 1, 8, 16]))
    gap = 0 if dense else draw(st.sampled_from([0, 0, 1, 16]))
    transposed = not dense and draw(st.booleans())
    first, second = (cols, rows) if transposed else (rows, cols)
    flat = torch.zeros(offset + first * (second + gap), dtype=dtype)
    found = flat[offset:].view(first, second + gap)[:, :second]
    return found.t() if transposed else found


SIZES = st.sampled_from([1, 5, 16, 17, 48, 64, 300])


@st.composite
def launches(draw: st.DrawFn) -> tuple[Any, list[Tensor]]:
    """A launch of one of the launchers, and the tensors that it is given."""
    m, n, k = draw(SIZES), draw(SIZES), draw(SIZES)
    dtype = draw(st.sampled_from(DTYPES))

    def matrix(rows: int, cols: int, kind: torch.dtype = dtype, *, dense: bool = False) -> Tensor:
        return draw(matrices(rows, cols, kind, dense=dense))

    def maybe(t: Tensor) -> Tensor | None:
        return t if draw(st.booleans()) else None

    kind = draw(st.sampled_from(["fwd", "dgrad", "wgrad", "activation", "loss", "cross_entropy", "both", "head"]))
    w, b = matrix(n, k), maybe(matrix(1, n)[0])
    if kind == "fwd":
        x = matrix(m, k, draw(st.sampled_from([dtype, torch.uint8])))
        rows = maybe(torch.zeros(m, dtype=torch.int64))
        a, z = matrix(m, n, dense=True), maybe(matrix(m, n, dense=True))
        options = {"rows": rows, "a": a, "z": z, "save_z": z is not None}
        return (lambda: kernels.linear_fwd(x, w, b, "gelu", **options)), [x, w, a]
    dz = matrix(m, n)
    if kind == "dgrad":
        saved, dx = maybe(matrix(m, k, dense=True)), matrix(m, k, dense=True)
        return (lambda: kernels.linear_dgrad(dz, w, saved, "tanh", dx=dx)), [dz, w, dx]
    if kind == "wgrad":
        x, dw = matrix(m, k), matrix(n, k, dense=True)
        return (lambda: kernels.linear_wgrad(dz, x, bias=b is not None, dw=dw)), [dz, x, dw]
    if kind == "activation":
        saved = matrix(m, n, dense=True)
        return (lambda: kernels.activation_bwd(dz, saved, "silu", dz=saved)), [dz, saved]
    if kind == "loss":
        y, scale = matrix(m, n), draw(st.sampled_from([1.0, -0.0, 0.0, 0.25]))
        loss = draw(st.sampled_from(["mse", "huber"]))
        return (lambda: kernels.elementwise_loss(dz, y, loss, scale=scale, da=dz)), [dz, y]
    labels, e = torch.zeros(m, dtype=torch.int64), draw(st.sampled_from([0.0, 0.1, 0.2]))
    if kind == "cross_entropy":
        reduction = draw(st.sampled_from(["mean", "sum", "none"]))
        return (lambda: kernels.cross_entropy_fwd(dz, labels, smoothing=e, reduction=reduction)), [dz, labels]
    if kind == "both":
        scale = maybe(torch.ones(()))
        return (lambda: kernels.cross_entropy(dz, labels, smoothing=e, scale=0.5 if scale is None else scale)), [dz]
    h, w = matrix(m, k), matrix(10, k)
    saved = h if draw(st.booleans()) else matrix(m, k, dense=True)  # one tensor in two places
    return (lambda: kernels.head(h, w, None, labels, activation="tanh", saved=saved, scale=e)), [h, w, saved]


@pytest.mark.parametrize("arch", TARGETS, ids=str)
def test_every_launcher_launches_what_the_binder_would(arch):
    """Drawn shapes, strides, addresses, dtypes and options, which share one memory; each launch is made twice."""
    with Gpu(arch) as gpu:

        @given(launches(), st.booleans())
        @settings(max_examples=60, deadline=None)
        def check(drawn: tuple[Any, list[Tensor]], tf32: bool) -> None:
            set_matmul("tf32" if tf32 else "ieee")
            function, tensors = drawn
            same_as_the_binder(gpu, function, tensors)
            # Aligned as before or not, no launch of what is known asks Triton.
            assert same_as_the_binder(gpu, function, tensors) == 0

        try:
            check()
        finally:
            set_matmul("ieee")


@given(
    st.sampled_from(DTYPES), st.lists(SIZES, min_size=2, max_size=4), SIZES, st.lists(st.booleans(), min_size=9),
    st.sampled_from(["relu", "gelu", "step"]), st.booleans(), st.data(),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_network_launches_what_the_binder_would(dtype, sizes, m, flags, activation, dropping, data):
    x = data.draw(matrices(m, sizes[0], dtype, dense=flags[0]))
    weights = [data.draw(matrices(n, k, dtype)) for k, n in pairwise(sizes)]
    biases = [torch.zeros(n, dtype=dtype) if bias else None for n, bias in zip(sizes[1:], flags[1:], strict=False)]
    count = len(weights)
    saved = [torch.zeros(m, n, dtype=dtype) for n in sizes[1:]]
    dz = data.draw(matrices(m, sizes[-1], dtype, dense=True))
    params = [p for pair in zip(weights, biases, strict=True) for p in pair]
    wants = tuple(
        w and (which == 0 or b is not None) for w, b in zip(flags[4:], biases, strict=False) for which in (0, 1)
    )
    wanted = (flags[8], *wants)
    activations = (activation,) * count
    kinds = ({"relu": "a", "gelu": "z", "step": None}[activation],) * count
    backward = (dz, (x, *saved, *weights, *saved), activations, kinds, wanted)
    saves_z = tuple(flags[:count])
    state, drops = torch.zeros(2, dtype=torch.int64), None
    if dropping:
        drops = state, tuple([(layer, 0.25, 1) if flags[layer] else None for layer in range(count)])
    backward = (*backward, drops)
    with Gpu(90) as gpu:
        tensors = [x, dz, *weights, *saved, state]
        for _ in range(2):
            same_as_the_binder(gpu, lambda: network_fwd(x, params, activations, saves_z, None, drops), tensors)
            if network_bwd(*backward) is None:
                assert x.stride(1) != 1
                assert wanted[1]
            elif any(wanted) or count > 1:
                same_as_the_binder(gpu, lambda: network_bwd(*backward), tensors)


def test_each_thing_that_a_launch_depends_on_is_in_the_key():
    def fwd(x: Tensor, w: Tensor, b: Tensor | None = None, activation: str = "relu") -> None:
        kernels.linear_fwd(x, w, b, activation, a=torch.zeros(32, 16, dtype=w.dtype))

    x, w = torch.zeros(32, 16), torch.zeros(16, 16)
    shifted = torch.zeros(32 * 16 + 1)[1:].view(32, 16)
    variants = {
        "dtype": (x.bfloat16(), w.bfloat16()),
        "pixels": (x.byte(), w),
        "strides": (x, w.t()),
        "alignment": (shifted, w),
        "rows apart": (torch.zeros(32, 32)[:, :16], w),
        "shape": (torch.zeros(32, 32), torch.zeros(16, 32)),
        "a tensor more": (x, w, torch.zeros(16)),
        "a setting": (x, w, None, "gelu"),
    }
    with Gpu(90) as gpu:
        fwd(x, w)
        for what, arguments in variants.items():
            assert same_as_the_binder(gpu, lambda a=arguments: fwd(*a), [*arguments[:2]]) == 1, what
            assert same_as_the_binder(gpu, lambda: fwd(x, w), [x, w]) == 0, what
        set_matmul("tf32")
        try:
            assert same_as_the_binder(gpu, lambda: fwd(x, w), [x, w]) == 1, "tf32"
        finally:
            set_matmul("ieee")
        fwd(x, w)
        gpu._device += 1
        try:
            gpu.asked = 0
            fwd(x, w)
            assert gpu.asked == 1, "another device of the same driver"
        finally:
            gpu._device -= 1


def one_launch(gpu: Gpu) -> bool:
    """Launch the same thing; returns whether Triton was asked."""
    gpu.asked = 0
    kernels.linear_fwd(torch.zeros(16, 16), torch.zeros(16, 16), None, "relu", a=torch.zeros(16, 16))
    return gpu.asked == 1


def test_what_is_remembered_and_what_is_asked_again(monkeypatch):
    with Gpu(90) as gpu:
        assert one_launch(gpu)
        assert not one_launch(gpu)
        with Gpu(90) as other:
            assert one_launch(other), "another driver"
        assert not one_launch(gpu)
        configs.use_new_table()
        assert one_launch(gpu), "another table of tiles"
        module = __import__("fastmlp.kernels.linear_fwd", fromlist=["gemm_tile"])
        rule = module.gemm_tile
        monkeypatch.setattr(module, "gemm_tile", lambda *shape, **options: rule(*shape, **options))
        assert one_launch(gpu), "another rule of the tiles"
        assert not one_launch(gpu)
        monkeypatch.setattr(knobs.runtime, "debug", True)
        assert one_launch(gpu), "another knob"
        assert not one_launch(gpu)


def test_hooks_see_every_launch(monkeypatch):
    seen: list[str] = []
    with Gpu(90) as gpu:
        one_launch(gpu)
        kernel = __import__("fastmlp.kernels.linear_fwd", fromlist=["_"])._linear_fwd_kernel
        kernel.add_pre_run_hook(lambda *args, **options: seen.append("before run"))
        assert one_launch(gpu)
        kernel.pre_run_hooks.clear()
        assert not one_launch(gpu)
        monkeypatch.setattr(knobs.runtime, "launch_exit_hook", lambda metadata: None)
        assert one_launch(gpu)
    assert seen == ["before run"]


def test_the_memory_is_bounded_and_holds_no_tensors(monkeypatch):
    monkeypatch.setattr(launch, "MOST", 3)
    with Gpu(90) as gpu:
        for m in range(1, 6):
            kernels.linear_fwd(torch.zeros(m, 16), torch.zeros(16, 16), None, "relu")
        memory = launch._memories[gpu]
        assert 0 < len(memory) <= 3

        def tensors(value: Any) -> Iterator[Tensor]:
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, (tuple, list)):
                for part in value:
                    yield from tensors(part)

        assert not list(tensors([*memory.keys(), *memory.values()]))


def test_amd_asks_for_the_size_of_a_storage():
    """Triton's code for AMD has 32-bit offsets only if the whole storage is small enough for them."""
    with Gpu(("hip", "gfx942")) as gpu:
        one_launch(gpu)
        with mock.patch.object(torch.UntypedStorage, "nbytes", return_value=2**31):
            assert one_launch(gpu)


def step(model: fastmlp.MLP, loss: torch.nn.Module, x: Tensor, y: Tensor) -> None:
    """Forward pass, loss and backward pass, all of them launches."""
    model.zero_grad()
    loss(model(x), y).backward()


@pytest.mark.parametrize("shape", [(16, 12), (16, 3, 4)])
def test_modules_launch_what_the_binder_would(shape):
    """The signature that the check of the arguments made is the one of the tensors that are launched."""
    model, x, y = fastmlp.MLP((12, 16, 10), "gelu"), torch.zeros(shape), torch.zeros(16, dtype=torch.long)
    loss = fastmlp.CrossEntropyLoss()
    with Gpu(90) as gpu, fastmlp.use_backend("triton"):
        for asked in (6, 0, 0):
            assert same_as_the_binder(gpu, lambda: step(model, loss, x, y), [x, y, *model.parameters()]) == asked
        shifted = torch.zeros(x.numel() + 1)[1:].view(shape)
        assert same_as_the_binder(gpu, lambda: step(model, loss, shifted, y), [shifted, y, *model.parameters()]) > 0
        frozen = model.layers[0].requires_grad_(False)
        assert same_as_the_binder(gpu, lambda: step(model, loss, x, y), [x, y, *frozen.parameters()]) > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's own forward-mode derivatives
def test_what_passed_once_is_looked_at_again_where_something_else_changed():
    x, y = torch.zeros(16, 12), torch.zeros(16, dtype=torch.long)
    model, loss = fastmlp.MLP((12, 16, 10)), fastmlp.CrossEntropyLoss()
    ignoring = functools.partial(fastmlp.functional.cross_entropy, ignore_index=1)
    with Gpu(90), fastmlp.use_backend("triton"):
        for _ in range(2):
            step(model, loss, x, y)
            ignoring(model(x), y)
        z = model(x)
        for wrong in (x.double(), x[:, :8], x[0], None):
            with pytest.raises((RuntimeError, TypeError)):
                model(wrong)
        weights, biases = ([getattr(layer, name) for layer in model.layers] for name in ("weight", "bias"))
        with pytest.raises(ValueError, match="unknown activation"):
            fastmlp.functional.mlp(x, weights, biases, ["sigmoid", "nothing"])
        with pytest.raises(ValueError, match="as many weights as biases"):
            fastmlp.functional.mlp(x, weights, biases[:1], ["sigmoid", "identity"])
        for _ in range(2):  # on the CPU the labels are looked at every time
            with pytest.raises(IndexError):
                loss(z, y + 10)
            with pytest.raises(ValueError, match="as many labels as rows"):
                loss(z, y[:4])
            with pytest.raises(TypeError):
                ignoring(z, y, ignore_index=1.0)
            with pytest.raises(TypeError):
                ignoring(z, y, weight=[1.0] * 10)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            torch.func.vmap(model)(x.view(4, 4, 12))
        with pytest.raises(RuntimeError, match="forward-mode"), forward_ad.dual_level():
            model(forward_ad.make_dual(x, x))
        with Operators() as operators:
            step(model, loss, x, y)
        assert {"linear_fwd", "cross_entropy_fwd", "cross_entropy_bwd", "linear_wgrad"} <= operators.names
        with fastmlp.use_backend("torch"):
            assert model(x).isfinite().all()


class Operators(TorchDispatchMode):
    """The operators of fastmlp that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "fastmlp":
            self.names.add(function.__name__.split(".")[0])
        return function(*args, **(kwargs or {}))


def test_views_that_negate_are_copied():
    x, w = torch.randn(4, 16), torch.randn(8, 16)
    view = negated(x)
    with Gpu(80) as gpu, fastmlp.use_backend("triton"):
        fastmlp.functional.linear_act(x.t().contiguous().t(), w)  # strides that the view does not have
        for given_x in (x, view, x, view):
            gpu.made = []
            fastmlp.functional.linear_act(given_x, w)
            ((_, _, arguments),) = gpu.made
            inputs = [t for t in arguments if isinstance(t, Tensor) and t.shape == x.shape]
            assert [t.is_neg() for t in inputs] == [False]
            assert torch.equal(inputs[0], x)
