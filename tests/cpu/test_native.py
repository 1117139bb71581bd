"""Units of machine code: what they compute, the files in which they are kept, and machines without numba."""

from __future__ import annotations

import ctypes
import sys
import warnings

import mpmath
import pytest
import torch

import fastmlp
from fastmlp import reference
from fastmlp.activations import ACTIVATIONS
from fastmlp.base.dropout import threshold
from fastmlp.base.losses import STEP_LOSSES
from fastmlp.cpu import choose, native
from fastmlp.cpu.native import machine_code, unit_names
from fastmlp.step.cpu_native import NativeStep
from fastmlp.step.optimizers import OPTIMIZERS

needs_numba = pytest.mark.usefixtures("native_code")
#: The activations with loops for numba.
LOOPS = [name for name in ACTIVATIONS if name != "identity" and machine_code.written(f"activations.{name}")]


def step_of(rows: int = 4) -> tuple[fastmlp.TrainStep, torch.Tensor]:
    step = fastmlp.TrainStep(fastmlp.MLP((3, 4, 2)), lr=0.1)
    return step, step(torch.ones(rows, 3), torch.zeros(rows, dtype=torch.int64))


def elementwise(unit: str, *tensors: torch.Tensor) -> None:
    """Call a unit of ``activations`` or ``derivatives``."""
    units = native.units(tensors[0].dtype, [unit])
    assert units is not None
    place = ctypes.c_int64()
    where = ctypes.addressof(place)
    assert units.function(unit)(where, where, *(t.data_ptr() for t in tensors), tensors[0].numel()) == 0


def exactly(name: str, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f and f' with 40 digits, rounded to float64. torch's own float64 is not exact, and differs between processors."""
    one, half, two = mpmath.mpf(1), mpmath.mpf("0.5"), mpmath.mpf(2)
    exp, sigmoid = mpmath.exp, lambda x: one / (one + mpmath.exp(-x))
    formulas = {
        "sigmoid": (sigmoid, lambda x: sigmoid(x) * sigmoid(-x)),
        "tanh": (mpmath.tanh, lambda x: one / mpmath.cosh(x) ** 2),
        "silu": (lambda x: x * sigmoid(x), lambda x: sigmoid(x) + x * sigmoid(x) * sigmoid(-x)),
        "gelu": (
            lambda x: x * half * mpmath.erfc(-x / mpmath.sqrt(two)),
            lambda x: half * mpmath.erfc(-x / mpmath.sqrt(two)) + x * exp(-x * x / two) / mpmath.sqrt(two * mpmath.pi),
        ),
    }
    with mpmath.workdps(40):
        return tuple(  # type: ignore[return-value]
            torch.tensor([float(of(mpmath.mpf(x))) for x in z.tolist()], dtype=torch.float64) for of in formulas[name]
        )


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOOPS)
def test_activations(name, dtype):
    """f and f' over all sizes of numbers: at most twice torch's own error, and one rounding of the largest term."""
    f = ACTIVATIONS[name]
    z = torch.cat([torch.linspace(-110, 110, 1001), torch.linspace(-6, 6, 1001), torch.logspace(-30, 2, 250)])
    z = torch.cat((z, -z)).to(dtype)
    dz = torch.linspace(-2, 2, len(z), dtype=dtype)
    if name == "step":
        exact, slope = f.new(z.double()), torch.zeros_like(z)
    elif f.kink is not None:
        exact, slope = f.new(z.double()), torch.where(z > 0, 1.0, f.kink)
    else:
        exact, slope = exactly(name, z)
    exact_grad = slope * dz.double()
    a, own = z.clone(), f.new(z.clone())
    elementwise(f"activations.{name}", a)
    grad = dz.clone()
    elementwise(f"derivatives.{name}", a if f.saved == "a" else z, grad)
    own_grad = f.backward(dz, own if f.saved == "a" else z)
    for ours, theirs, right in ((a, own, exact), (grad, own_grad, exact_grad)):
        budget = 2 * (theirs - right).abs() + torch.finfo(dtype).eps * (4 * right.abs() + torch.finfo(dtype).tiny)
        if f.saved == "a":  # 1 - A has the rounding of A
            budget = budget + torch.finfo(dtype).eps * dz.abs()
        if name in ("gelu", "silu"):  # f and f' are products of z, or of 1, with what is rounded where it is near 1
            budget = budget + 2 * torch.finfo(dtype).eps * (1 + z.abs().clamp(max=8)) * dz.abs().clamp(min=1)
        assert ((ours - right).abs() <= budget).all(), z[(ours - right).abs() > budget]


def unit(name: str, dtype: torch.dtype, *kinds: type):
    """A unit as a function of its arguments."""
    units = native.units(dtype, [name])
    assert units is not None
    function = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * 2, *kinds)(units[name])
    place = ctypes.c_int64()
    where = ctypes.addressof(place)
    return lambda *arguments: function(where, where, *arguments)


def near(ours, exact, terms, dtype, steps) -> bool:
    """Whether sums of so many terms are as near as their size allows."""
    return bool(((ours - exact).abs() <= torch.finfo(dtype).eps * (steps + 2) * (terms + 1)).all())


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_every_number_of_rows_and_columns(dtype):
    """C = keep C + factor A B for every way to divide C into tiles; nothing beside C is written."""
    i64, real = ctypes.c_int64, ctypes.c_float if dtype == torch.float32 else ctypes.c_double
    product = unit("products.product", dtype, *[i64] * 10, real, i64)
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 3, 4, 6, 7, 8, 9, 10, 12, 13, 15, 16, 20, 22, 31):
        for columns in (1, 7, 8, 16, 29):
            for steps in (1, 9):
                a = torch.randn(steps, rows, generator=generator, dtype=dtype)  # A is the transpose
                b = torch.randn(steps, columns + 1, generator=generator, dtype=dtype)
                c = torch.randn(rows + 1, columns + 3, generator=generator, dtype=dtype)
                for keep in (0, 1):
                    into = c.clone()
                    product(
                        a.data_ptr(), 1, rows, b.data_ptr(), columns + 1, steps, into.data_ptr(), columns + 3, rows,
                        columns, -0.5, keep,
                    )  # fmt: skip
                    exact, terms = c.double(), c.double().abs()
                    left, right = a.t().double(), b[:, :columns].double()
                    exact[:rows, :columns] = keep * exact[:rows, :columns] - 0.5 * left @ right
                    terms[:rows, :columns] += left.abs() @ right.abs()
                    assert near(into, exact, terms, dtype, steps), (rows, columns, steps, keep)
                    into[:rows, :columns] = c[:rows, :columns]
                    assert torch.equal(into, c)


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_of_every_size(dtype):
    """Z = X W^T + b, where X and Z are transposed in squares with rest, and where they are not."""
    units = native.units(dtype, [])
    assert units is not None
    forward = unit("products.forward", dtype, *[ctypes.c_int64] * 11)
    generator = torch.Generator().manual_seed(0)
    for m in (1, 3, 4, 7, 8, 9, 16, 21):
        for n in (1, 5, 8, 17):
            for k in (1, 4, 8, 19):
                x, w, b = (torch.randn(*s, generator=generator, dtype=dtype) for s in ((m, k), (n, k), (n,)))
                x_t, z_t, z = (torch.empty(size, dtype=dtype) for size in ((m + 16) * k, (m + 16) * n, m * n))
                net = (ctypes.c_int64 * native.layout.HEADER)()
                net[native.layout.PRODUCTS] = units["products.product"]
                net[native.layout.TRANSPOSED], net[native.layout.PRODUCT] = x_t.data_ptr(), z_t.data_ptr()
                of_net = ctypes.addressof(net)
                for bias in (b, None):
                    z.fill_(float("nan"))
                    place = 0 if bias is None else bias.data_ptr()
                    forward(of_net, x.data_ptr(), w.data_ptr(), b.data_ptr(), place, z.data_ptr(), m, n, k, 0, 1)
                    added = torch.zeros(n, dtype=torch.float64) if bias is None else bias.double()
                    exact = x.double() @ w.double().t() + added
                    terms = x.double().abs() @ w.double().abs().t() + added.abs()
                    assert near(z.view(m, n), exact, terms, dtype, k), (m, n, k)


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_of_dropout(dtype):
    """The bits of the reference: keys and counters of 64 bits, and every part of a group of columns."""
    i64 = ctypes.c_int64
    dropped = unit("dropout.dropped", dtype, *[i64] * 7, ctypes.c_double, *[i64] * 4)
    largest = (1 << 63) - 1
    for seed, step, layer, stream in ((0, 0, 0, 0), (-1, 3, 1, 2), (largest, largest, 7, 1), (-(1 << 63), -5, 2, 0)):
        for rows, columns, p in ((1, 1, 0.5), (3, 16, 0.25), (5, 17, 1e-9), (2, 63, 0.1), (4, 4, 0.99999)):
            for first in (0, 6):
                a = torch.linspace(-2, 2, rows * columns, dtype=dtype).view(rows, columns)
                out, factors = torch.full_like(a, 7.0), torch.full((rows * columns + 1,), 7.0, dtype=dtype)
                places = a.data_ptr(), out.data_ptr(), factors.data_ptr()
                dropped(*places, rows, columns, layer, threshold(p), p, first, seed, step, stream)
                keep = reference.keep_mask(seed, step, layer, first + rows, columns, p, stream)[first:]
                expected = keep.to(dtype) * (1 / (1 - p))
                assert torch.equal(factors[:-1].view(rows, columns), expected)
                assert torch.equal(out, a * expected)
                assert factors[-1] == 7.0


def test_every_loss_and_optimizer_has_its_unit():
    settings = {"clips": True, "averages": True}
    for loss in STEP_LOSSES.values():
        for kind in ("losses", "row_weights"):
            assert unit_names(LOOPS, f"{kind}.{loss}", "sgd", **settings)
    for rule in OPTIMIZERS:
        assert unit_names(LOOPS, "losses.mse", rule, **settings)
    assert unit_names(["softsign"], "losses.mse", "sgd", **settings) is None


@needs_numba
def test_units_are_kept_in_files(tmp_path, monkeypatch):
    """The second process compiles nothing. A damaged file is compiled anew."""
    compiled: list[str] = []
    compile_ = machine_code._compiled
    monkeypatch.setattr(machine_code, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(machine_code, "_compiled", lambda unit, dtype: compiled.append(unit) or compile_(unit, dtype))
    name = "derivatives.relu"
    assert machine_code._loaded(name, torch.float32)
    assert machine_code._loaded(name, torch.float32)
    assert compiled == [name]
    (path,) = (tmp_path / "native").glob("*.o")
    path.write_bytes(path.read_bytes()[:-1])
    assert machine_code._loaded(name, torch.float32)
    assert compiled == [name, name]
    assert machine_code._read(path) is not None


@needs_numba
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(machine_code, "cache_folder", lambda: tmp_path / "file")
    assert machine_code._loaded("derivatives.relu", torch.float32)


@pytest.fixture
def broken(monkeypatch):
    """Numba is there, and fails."""

    def fails(dtype):
        raise ImportError("numba needs another numpy")

    monkeypatch.setattr(machine_code, "_broken", {})
    monkeypatch.setattr(machine_code, "_units", fails)
    monkeypatch.setattr(machine_code, "installed", lambda: True)
    monkeypatch.setattr(native, "installed", lambda: True)


def test_a_broken_numba_is_told_once(broken):
    with pytest.warns(RuntimeWarning, match="numba needs another numpy"):
        step, loss = step_of()
    assert loss.isfinite()
    assert not isinstance(step._engine._planned(4), NativeStep)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_of()


def test_a_broken_numba_that_was_asked_for_is_an_error(broken, fresh_mode):
    fastmlp.set_cpu_gemm("native")
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="numba needs another numpy"):
        step_of()


@pytest.fixture
def fresh_mode():
    mode = fastmlp.get_cpu_gemm()
    yield
    fastmlp.set_cpu_gemm(mode)


def test_without_numba(monkeypatch, fresh_mode):
    """Steps run on operators. Who asks for machine code is told what to install."""
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(machine_code, "installed", lambda: False)
    step, loss = step_of()
    assert loss.isfinite()
    assert not isinstance(step._engine._planned(4), NativeStep)
    with pytest.raises(RuntimeError, match=r"fastmlp\[cpu\]"):
        fastmlp.set_cpu_gemm("native")
    assert native.units(torch.float32, []) is None


@needs_numba
def test_machine_code_is_one_of_the_ways(monkeypatch):
    """It is measured beside the others, and chosen where it is the fastest."""
    fastmlp.set_cpu_gemm("auto")
    seen: list[str] = []

    def fastest(candidates):
        seen.extend(candidates)
        for run in candidates.values():
            run()
        return "native" if "native" in candidates else next(iter(candidates))

    monkeypatch.setattr(choose, "_fastest", fastest)
    monkeypatch.setattr(choose, "_choices", {})
    monkeypatch.setattr(choose.cache, "kept", lambda: {})
    monkeypatch.setattr(choose.cache, "keep", lambda choices: None)
    step, _ = step_of()
    assert isinstance(step._engine._planned(4), NativeStep)
    assert "native" in seen
    for rows in (129, 1 << 20):
        seen.clear()
        step._engine.network.kind()
        assert not fastmlp.cpu.native_rows(rows)


@needs_numba
def test_the_same_bits_where_the_user_wants_atens():
    fastmlp.set_cpu_gemm("aten")
    step, _ = step_of()
    assert not isinstance(step._engine._planned(4), NativeStep)


@needs_numba
def test_other_dtypes_go_another_way():
    step = fastmlp.TrainStep(fastmlp.MLP((3, 4, 2)), dtype=torch.bfloat16)
    assert step(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64)).isfinite()
    assert not isinstance(step._engine._planned(4), NativeStep)
