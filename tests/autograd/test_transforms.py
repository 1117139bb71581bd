"""Batched backward passes and forward-mode derivatives: what torch's transforms make of every function.

Each function has a twin in plain torch. A transform of the function must give what it gives of the twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F

import fastmlp
from fastmlp import functional, reference
from fastmlp.activations import ACTIVATIONS

pytestmark = [
    pytest.mark.usefixtures("own_nodes"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),  # of torch.func.linearize
]
Function = Callable[..., Tensor]


class Case(NamedTuple):
    """A function of fastmlp, its twin in torch, and the tensors to differentiate at."""

    ours: Function
    torchs: Function
    inputs: tuple[Tensor, ...]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def probabilities(*shape: int) -> Tensor:
    return torch.sigmoid(randn(*shape))


def layers(inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return inputs[0::2], inputs[1::2]


def reduced(losses: Tensor, reduction: str) -> Tensor:
    return losses if reduction == "none" else getattr(losses, reduction)()


def cases() -> Iterable[tuple[str, Case]]:
    x, w, b, w2, b2 = randn(3, 4), randn(5, 4), randn(5), randn(2, 5), randn(2)
    for name in (*ACTIVATIONS, "softmax"):
        f = (lambda z: z.softmax(-1)) if name == "softmax" else (lambda z, name=name: reference.activate(z, name))
        yield (
            f"linear_act {name}",
            Case(
                lambda x, w, b, name=name: functional.linear_act(x, w, b, name),
                lambda x, w, b, f=f: f(F.linear(x, w, b)),
                (x, w, b),
            ),
        )
        yield (
            f"mlp {name}",
            Case(
                lambda x, *p, name=name: functional.mlp(x, *layers(p), (name, "identity")),
                lambda x, w, b, w2, b2, f=f: F.linear(f(F.linear(x, w, b)), w2, b2),
                (x, w, b, w2, b2),
            ),
        )
    yield "softmax", Case(functional.softmax, lambda z: z.softmax(-1), (x,))
    for r in ("mean", "none"):
        k = {"reduction": r}
        a, y, logits = probabilities(3, 4), probabilities(4, 3).t(), randn(3, 4)
        for name, ours, torchs, first in (
            ("mse_loss", functional.mse_loss, F.mse_loss, logits),
            ("l1_loss", functional.l1_loss, F.l1_loss, logits),
            ("bce_loss", functional.bce_loss, F.binary_cross_entropy, a),
            ("bce_with_logits", functional.bce_with_logits, F.binary_cross_entropy_with_logits, logits),
            ("multiclass_nll", functional.multiclass_nll, lambda a, y, reduction: -(y * a.log()).sum(1), a),
            (
                "softmax_squared_error",
                functional.softmax_squared_error,
                lambda a, y, reduction: (a.softmax(1) - y).square().sum(1),
                logits,
            ),
        ):
            twin = lambda a, y, torchs=torchs, k=k: torchs(a, y, **k)  # noqa: E731
            if not hasattr(F, torchs.__name__):
                twin = lambda a, y, f=twin, r=r: reduced(f(a, y), r)  # noqa: E731
            yield f"{name} {r}", Case(lambda a, y, f=ours, k=k: f(a, y, **k), twin, (first, y))
    shapes = {
        "[C]": (randn(4), torch.tensor(2)),
        "[N, C]": (randn(3, 4), torch.tensor([3, -100, 0])),
        "[N, C, d]": (randn(2, 4, 3), torch.tensor([[0, 3, 1], [2, -100, 1]])),
    }
    weight = probabilities(4)
    for n, options in enumerate(
        (
            {"label_smoothing": 0.1},
            {"weight": weight, "reduction": "sum"},
            {"weight": weight, "label_smoothing": 0.1, "reduction": "none"},
        )
    ):
        for shape, (z, y) in shapes.items():
            ours, torchs = (
                lambda z, f=f, y=y, k=options: f(z, y, **k) for f in (functional.cross_entropy, F.cross_entropy)
            )
            yield f"cross_entropy labels {shape} {n}", Case(ours, torchs, (z,))
            ours, torchs = (
                lambda z, t, f=f, k=options: f(z, t, **k) for f in (functional.cross_entropy, F.cross_entropy)
            )
            yield f"cross_entropy probabilities {shape} {n}", Case(ours, torchs, (z, probabilities(*z.shape)))
    for shape, (z, y) in shapes.items():
        labels = y.clamp_min(0)
        yield (
            f"cross_entropy uint8 {shape}",
            Case(
                lambda z, y=labels: functional.cross_entropy(z, y.byte(), reduction="none"),
                lambda z, y=labels: F.cross_entropy(z, y, reduction="none"),
                (z,),
            ),
        )


CASES = dict(cases())


def leaves(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in inputs]


def tangents(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.linspace(-1, 1, t.numel(), dtype=t.dtype).cos().view(t.shape) for t in inputs)


def to_number(f: Function) -> Function:
    """A weighted sum of a function's results."""

    def number(*inputs: Tensor) -> Tensor:
        out = f(*inputs)
        return (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view(out.shape)).sum()

    return number


def tangent_of(f: Function, inputs: Sequence[Tensor]) -> Tensor | None:
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, inputs, tangents(inputs))
        return forward_ad.unpack_dual(f(*duals)).tangent


def one_tangent_at_a_time(f: Function, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Off the tape, where no torch.autograd.Function would see the tangent."""
    found = []
    for i, t in enumerate(inputs):
        with torch.no_grad(), forward_ad.dual_level():
            dual = forward_ad.make_dual(t, tangents([t])[0])
            found.append(forward_ad.unpack_dual(f(*inputs[:i], dual, *inputs[i + 1 :])).tangent)
    return found


def backward_with_tangents(f: Function, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    at = leaves(inputs)
    out = f(*at)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(out), torch.full_like(out, 0.5))
        return [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(out, at, upstream)]


def unit_gradients(out: Tensor) -> Tensor:
    return torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)


def batched(f: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A batched backward pass, and the backward pass of its result."""
    at = leaves(inputs)
    out = f(*at)
    rows = torch.autograd.grad(out, at, unit_gradients(out), is_grads_batched=True, create_graph=True)
    total = sum(g.square().sum() for g in rows) + out.sum()
    return [*rows, *torch.autograd.grad(total, at)]


def vmapped(f: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    at = leaves(inputs)
    out = f(*at)
    return torch.vmap(lambda g: torch.autograd.grad(out, at, g, retain_graph=True))(unit_gradients(out))


def linearized(f: Function, inputs: Sequence[Tensor]) -> Any:
    out, jvp = torch.func.linearize(f, *inputs)
    return out, jvp(*tangents(inputs))


def every(inputs: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(inputs)))


#: What a transform computes of a function at its inputs: tensors in tuples and lists.
TRANSFORMS: dict[str, Callable[[Function, tuple[Tensor, ...]], Any]] = {
    "jacobian, vectorized": lambda f, x: jacobian(f, x, vectorize=True),
    "hessian, vectorized": lambda f, x: hessian(to_number(f), x, vectorize=True),
    "batched": batched,
    "vmap over a backward pass": vmapped,
    "jacobian, forward mode": lambda f, x: jacobian(f, x, vectorize=True, strategy="forward-mode"),
    "dual numbers": tangent_of,
    "dual numbers on the tape": lambda f, x: tangent_of(f, leaves(x)),
    "one tangent at a time": one_tangent_at_a_time,
    "jvp": lambda f, x: torch.func.jvp(f, x, tangents(x)),
    "hessian of torch.func": lambda f, x: torch.func.hessian(to_number(f), every(x))(*x),
    "linearize": linearized,
}
FORWARD = list(TRANSFORMS)[4:]


def flat(results: Any) -> list[Tensor | None]:
    return [t for r in results for t in flat(r)] if isinstance(results, (tuple, list)) else [results]


def assert_same(transform: str, case: Case, **tolerances: float) -> None:
    got, want = (flat(TRANSFORMS[transform](f, case.inputs)) for f in (case.ours, case.torchs))
    assert len(got) == len(want)
    for actual, expected in zip(got, want, strict=True):
        assert actual is not None
        torch.testing.assert_close(actual, expected, **tolerances or {"rtol": 1e-9, "atol": 1e-11})


@pytest.mark.parametrize("name", CASES)
def test_transforms(name):
    for transform in list(TRANSFORMS)[:-1]:
        assert_same(transform, CASES[name])


@pytest.mark.parametrize(
    "name", ["mlp tanh", "linear_act gelu", "softmax", "bce_loss mean", "cross_entropy labels [N, C] 0"]
)
def test_linearize(name):
    """Slow, because torch traces the function: not for every function."""
    assert_same("linearize", CASES[name])


@pytest.mark.parametrize("name", ["mlp gelu", "mlp silu", "linear_act tanh", "cross_entropy probabilities [N, C] 0"])
def test_gradcheck_with_everything(name):
    case = CASES[name]
    at = tuple(leaves(case.inputs))
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert gradcheck(case.ours, at, check_batched_grad=True, **forward, fast_mode=True)
    second = {"check_fwd_over_rev": True, "check_rev_over_rev": True}
    assert gradgradcheck(case.ours, at, check_batched_grad=True, **second, fast_mode=True)


@pytest.mark.parametrize("activation", ["tanh", "gelu", "silu", "step", "leaky_relu"])
def test_a_backward_pass_with_tangents(activation):
    """The forward pass was outside of the dual level, so its node is fastmlp's."""
    case = Case(
        lambda x, *p: functional.mlp(x, *layers(p), (activation, "identity")),
        lambda x, *p: reference.mlp(x, *layers(p), (activation, "identity")),
        CASES["mlp tanh"].inputs,
    )
    at = leaves(case.inputs)
    want = [0.5 * g for g in torch.autograd.grad(case.torchs(*at).sum(), at)]
    for actual, expected in zip(backward_with_tangents(case.ours, case.inputs), want, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("library", ["aten", "onednn"])
def test_no_library_drops_a_tangent(library):
    """Products so large that fastmlp.cpu makes them."""
    if library == "onednn" and not fastmlp.cpu.onednn.available():
        pytest.skip("this build of torch has no oneDNN")
    model = fastmlp.MLP((256, 512, 256), "relu")
    x = torch.randn(128, 256)
    before = fastmlp.get_cpu_gemm()
    fastmlp.set_cpu_gemm(library)
    try:
        with torch.no_grad():
            got, want = tangent_of(model, [x]), tangent_of(model.to_torch(), [x])
    finally:
        fastmlp.set_cpu_gemm(before)
    assert got is not None
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_tangents_of_parameters():
    """As torch's tutorial sets them: the parameter is deleted, and a dual number takes its name."""
    model = fastmlp.MLP((4, 5, 2), "gelu", dtype=torch.float64).requires_grad_(False)
    x, names = randn(3, 4), [name for name, _ in model.named_parameters()]
    values = tuple(p.detach().clone() for p in model.parameters())
    want = torch.func.jvp(lambda *p: reference.mlp(x, *layers(p), ("gelu", "identity")), values, tangents(values))[1]
    with forward_ad.dual_level():
        for name, value, tangent in zip(names, values, tangents(values), strict=True):
            layer, _, own = name.rpartition(".")
            delattr(model.get_submodule(layer), own)
            setattr(model.get_submodule(layer), own, forward_ad.make_dual(value, tangent))
        got = forward_ad.unpack_dual(model(x)).tangent
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "function",
    [
        lambda z: functional.linear_act(z, torch.eye(4)),
        lambda z: functional.mlp(z, [torch.eye(4)], [None], ["gelu"]),
        lambda z: functional.softmax(z),
        lambda z: functional.mse_loss(z, torch.zeros(3, 4)),
        lambda z: functional.cross_entropy(z, torch.tensor([0, 1, 2]), label_smoothing=0.1),
    ],
)
def test_inference_mode_refuses_tangents(function):
    """torch itself drops the tangent there without a word."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(3, 4), torch.ones(3, 4))
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"use torch\.no_grad"):
            function(dual)
        with torch.inference_mode():
            function(torch.ones(3, 4))


class TestKinks:
    """The derivatives are those of the tape where a formula has a kink or a pole."""

    @pytest.mark.parametrize(
        ("loss", "a", "y"),
        [
            (functional.bce_with_logits, [0.0, -0.0, 2.0], [0.0, 1.0, 0.3]),
            (functional.bce_loss, [0.0, 1.0, 0.5], [0.0, 1.0, 1.0]),
            (functional.bce_loss, [0.0, 1.0, 0.5], [1.0, 0.0, 0.0]),
            (functional.l1_loss, [0.0, 1.0, -1.0], [0.0, 1.0, 2.0]),
            (functional.multiclass_nll, [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]),
        ],
    )
    def test_losses(self, loss, a, y):
        a, y = torch.tensor(a, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
        at = a.clone().requires_grad_()
        (want,) = torch.autograd.grad(loss(at, y), at)
        torch.testing.assert_close(torch.func.grad(loss)(a, y), want)
        torch.testing.assert_close(torch.func.jacfwd(loss)(a, y), want)

    def test_the_target_of_multiclass_nll(self):
        a, y = torch.tensor([0.25, 0.5]), torch.tensor([0.0, 1.0])
        torch.testing.assert_close(torch.func.grad(functional.multiclass_nll, 1)(a, y), -a.log())


class TestKernels:
    """Backend "triton": a backward pass takes the formulas where it is batched; forward mode is refused."""

    NAMES = (
        "mlp tanh",
        "linear_act gelu",
        "mse_loss none",
        "softmax_squared_error mean",
        "cross_entropy labels [N, C] 0",
    )

    @pytest.mark.parametrize("name", NAMES)
    def test_batched_backward(self, lane, name):
        case = CASES[name]
        case = case._replace(inputs=tuple(t.float().to(lane) for t in case.inputs))
        with fastmlp.use_backend("triton"):
            for transform in ("batched", "vmap over a backward pass"):
                assert_same(transform, case, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", NAMES)
    def test_tangents_are_refused(self, lane, name):
        case = CASES[name]
        case = case._replace(inputs=tuple(t.float().to(lane) for t in case.inputs))
        for transform in FORWARD:
            with (
                fastmlp.use_backend("triton"),
                pytest.raises(RuntimeError, match=r"backend 'triton' .*use backend 'auto' or 'torch' there"),
            ):
                TRANSFORMS[transform](case.ours, case.inputs)
        with fastmlp.use_backend("triton"), forward_ad.dual_level():
            case.ours(*case.inputs)  # nothing carries a tangent
