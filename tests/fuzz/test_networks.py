"""The public functions and modules with their gradients: linear_act, mlp, MLP and cross_entropy together.

The backend is the kernels where they run (a GPU, Triton's interpreter) and plain torch otherwise.

The rounding of one layer is an input error of the next layer, so the budget of a network is measured, not derived. The
float64 network runs again with every operand, hidden activation and hidden gradient off by up to one rounding of the
dtype. The allowed error of a result is twice the error of these runs, or twice the error of torch in the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import fastmlp
from fastmlp import reference
from tests.conftest import HAS_GPU, INTERPRETING, WITH_KERNELS, uninitialized_is_nan
from tests.fuzz.cases import Labels, Spec, activations, dims, dtypes, fuzz, labels, root, specs

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    *WITH_KERNELS,
]
DEVICE = torch.device("cuda" if HAS_GPU and not INTERPRETING else "cpu")
BACKEND = "triton" if INTERPRETING or HAS_GPU else "torch"
PERTURBED_RUNS = 8


@dataclass(frozen=True)
class Layer:
    weight: Spec
    bias: Spec | None
    activation: str
    weight_learns: bool
    bias_learns: bool


@dataclass(frozen=True)
class Network:
    x: Spec
    x_learns: bool
    layers: tuple[Layer, ...]
    upstream: Spec

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].weight.dtype


@st.composite
def layers(draw: st.DrawFn, n_in: int, n_out: int, dtype: torch.dtype, *, expanded: bool) -> Layer:
    return Layer(
        weight=draw(specs((n_out, n_in), dtype, expanded=expanded, scale=root(n_in), scales=(1.0, 3.0))),
        bias=draw(st.none() | specs((n_out,), dtype, scales=(1.0,))),
        activation=draw(activations),
        weight_learns=draw(st.booleans()),
        bias_learns=draw(st.booleans()),
    )


@st.composite
def networks(draw: st.DrawFn, *, depth: int) -> Network:
    """A batch, the layers' sizes, and one dtype for all but pixels. The input of a single layer may have any rank."""
    batch, *sizes = draw(dims(depth + 2))
    dtype = draw(dtypes)
    n_in = sizes[0]
    shapes = [(batch, n_in)]
    if depth == 1:
        shapes += [(n_in,), (2, batch, n_in)]
    elif n_in % 2 == 0:
        shapes += [(batch, 2, n_in // 2)]
    shape = draw(st.sampled_from(shapes))
    pixels = draw(st.booleans())
    leading = shape[:-1] if depth == 1 else shape[:1]
    return Network(
        x=draw(specs(shape, torch.uint8 if pixels else dtype, scales=(1.0, 0.01, 5.0))),
        x_learns=not pixels and draw(st.booleans()),
        layers=tuple(draw(layers(a, b, dtype, expanded=depth == 1)) for a, b in pairwise(sizes)),
        upstream=draw(specs((*leading, sizes[-1]), dtype, expanded=len(leading) == 1, scales=(1.0,))),
    )


Forward = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor | None]], Tensor]


def run(
    case: Network, forward: Forward, dtype: torch.dtype | None = None, jitter: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor | None]:
    """[output, dX, dW_1, db_1, ...] in ``dtype`` (default: the case's); None for tensors that do not require grad."""

    def leaf(spec: Spec, learns: bool) -> Tensor:
        t = spec.build()
        if dtype is not None and t.is_floating_point():
            t = t.to(dtype)
        if jitter is not None and t.is_floating_point():
            t = jitter(t)
        return t.to(DEVICE).detach().requires_grad_(learns)

    x = leaf(case.x, case.x_learns)
    weights = [leaf(layer.weight, layer.weight_learns) for layer in case.layers]
    biases = [None if layer.bias is None else leaf(layer.bias, layer.bias_learns) for layer in case.layers]
    out = forward(x, weights, biases)
    leaves = [x, *(t for pair in zip(weights, biases, strict=True) for t in pair)]
    if out.requires_grad:
        before = [None if t is None else t.detach().clone() for t in leaves]
        upstream = case.upstream.build().to(device=DEVICE, dtype=out.dtype)
        out.backward(upstream)
        for t, was in zip(leaves, before, strict=True):
            assert t is None or was is None or torch.equal(t, was), "an input was written to"
    else:
        assert not any(t is not None and t.requires_grad for t in leaves)
    return [out.detach(), *(None if t is None else t.grad for t in leaves)]


def truth(case: Network, jitter: Callable[[Tensor], Tensor] = lambda t: t) -> Forward:
    """The network of ``fastmlp.reference``, layer by layer. ``jitter`` moves the values that layers round."""

    def forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
        a = reference.pixels(x, weights[0].dtype)
        a = a.flatten(1) if len(weights) > 1 else a
        for layer, w, b in zip(case.layers, weights, biases, strict=True):
            z = jitter(reference.linear_act(a, w, b))
            # The step activation is a comparison, which has no derivative on the tape. Its gradient is 0, not None.
            on_tape = 0 * z if layer.activation == "step" else 0
            a = jitter(reference.activate(z, layer.activation) + on_tape)
        return a

    return forward


class _Jitter(torch.autograd.Function):
    """t (1 + size u) with u uniform in [-1, 1], in the forward pass and on the gradient."""

    @staticmethod
    def forward(ctx, t: Tensor, size: float, g: torch.Generator) -> Tensor:
        ctx.size, ctx.g = size, g
        return t * (1 + size * (2 * torch.rand(t.shape, generator=g, dtype=t.dtype) - 1).to(t.device))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Jitter.forward(ctx, grad, ctx.size, ctx.g), None, None


def deviations(case: Network, expected: list[Tensor | None]) -> list[float]:
    """How far each result moves when every value is off by one rounding of the dtype."""
    worst = [0.0] * len(expected)
    eps = torch.finfo(case.dtype).eps
    for seed in range(PERTURBED_RUNS):
        g = torch.Generator().manual_seed(seed)

        def jitter(t: Tensor, g: torch.Generator = g) -> Tensor:
            return _Jitter.apply(t, eps, g)

        for i, (got, want) in enumerate(
            zip(run(case, truth(case, jitter), torch.float64, jitter), expected, strict=True)
        ):
            if got is not None and want is not None and got.numel():
                worst[i] = max(worst[i], (got - want).abs().max().item())
    return worst


def check(case: Network, forward: Forward) -> None:
    """Output and all gradients of ``forward`` on the backend under test."""
    with fastmlp.use_backend(BACKEND), uninitialized_is_nan():
        got = run(case, forward)
    expected = run(case, truth(case), torch.float64)
    own = run(case, truth(case))
    names = ["output", "dX", *(f"d{kind}_{i}" for i in range(len(case.layers)) for kind in ("W", "b"))]
    for name, ours, want, torchs, moved in zip(names, got, expected, own, deviations(case, expected), strict=True):
        assert (ours is None) == (want is None), f"{name}: {'no' if ours is None else 'an unwanted'} gradient"
        if ours is None or want is None or torchs is None or not ours.numel():
            continue
        assert ours.dtype == case.dtype
        assert ours.shape == want.shape
        error = (ours.double() - want).abs().max().item()
        info = torch.finfo(case.dtype)
        floor = info.eps * want.abs().max().item() + info.smallest_normal * info.eps
        allowed = 2 * max((torchs.double() - want).abs().max().item(), moved) + floor
        assert error <= allowed, f"{name}: error {error:.3e} is over {allowed:.3e}"


@fuzz(15, networks(depth=1))
def test_linear_act(case: Network):
    (layer,) = case.layers
    check(case, lambda x, w, b: fastmlp.functional.linear_act(x, w[0], b[0], layer.activation))


@fuzz(15, networks(depth=3))
def test_mlp(case: Network):
    names = [layer.activation for layer in case.layers]
    check(case, lambda x, w, b: fastmlp.functional.mlp(x, w, b, names))


@fuzz(5, networks(depth=2))
def test_mlp_module(case: Network):
    """An MLP of the same sizes. An MLP makes its own parameters, so only networks that an MLP can have come here."""

    def forward(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
        sizes = [weights[0].shape[1], *(w.shape[0] for w in weights)]
        model = fastmlp.MLP(sizes, [layer.activation for layer in case.layers], dtype=case.dtype, device=DEVICE)
        for module, w, b in zip(model.layers, weights, biases, strict=True):
            # Tensors replace the parameters, because the test checks the gradients of its own leaves.
            del module.weight, module.bias
            module.weight, module.bias = w, b
        return model(x)

    check(case, forward)


@dataclass(frozen=True)
class Loss:
    z: Spec
    target: Labels | Spec
    weight: Spec | None
    smoothing: float
    reduction: str
    target_learns: bool


@st.composite
def losses(draw: st.DrawFn) -> Loss:
    shape = draw(dims(2) | dims(3).filter(lambda s: s[0] * s[1] * s[2] <= 4096))
    shape = draw(st.sampled_from([shape, shape[1:2]])) if len(shape) == 2 else shape
    C = shape[1] if len(shape) > 1 else shape[0]
    dtype = draw(dtypes)
    label_shape = (shape[0], *shape[2:]) if len(shape) > 1 else ()
    target = draw(labels(label_shape, C) | specs(shape, dtype)) if label_shape else draw(specs(shape, dtype))
    return Loss(
        z=draw(specs(shape, dtype, scales=(1.0, 0.01, 20.0))),
        target=target,
        weight=draw(st.none() | specs((C,), dtype)),
        smoothing=draw(st.sampled_from([0.0, 0.1, 1.0])),
        reduction=draw(st.sampled_from(["none", "mean", "sum"])),
        target_learns=draw(st.booleans()),
    )


@fuzz(15, losses())
def test_cross_entropy(case: Loss):
    z, target = case.z.build().to(DEVICE), case.target.build().to(DEVICE)
    weight = None if case.weight is None else case.weight.build().abs().to(DEVICE)
    probabilities = target.is_floating_point()
    if probabilities:
        target = target.abs()
    options = {
        "ignore_index": case.target.ignore_index if isinstance(case.target, Labels) else -100,
        "label_smoothing": case.smoothing,
        "reduction": case.reduction,
    }

    def run_loss(function, dtype: torch.dtype | None) -> list[Tensor | None]:
        cast = [
            t if t is None or dtype is None or not t.is_floating_point() else t.to(dtype) for t in (z, target, weight)
        ]
        zd, td, wd = (None if t is None else t.detach() for t in cast)
        zd.requires_grad_()
        if probabilities:
            td.requires_grad_(case.target_learns)
        loss = function(zd, td, wd, **options)
        loss.sum().backward()
        return [loss.detach(), zd.grad, td.grad]

    def torchs(zd: Tensor, td: Tensor, wd: Tensor | None, **options) -> Tensor:
        return F.cross_entropy(zd, td if probabilities else td.long(), wd, **options)

    with fastmlp.use_backend(BACKEND), uninitialized_is_nan():
        got = run_loss(fastmlp.functional.cross_entropy, None)
    reach = z.double().max().item() - z.double().min().item() + 1.0
    size = reach * (1.0 if weight is None else max(1.0, weight.double().max().item()))
    for name, ours, want, own in zip(
        ("loss", "dZ", "dTarget"), got, run_loss(torchs, torch.float64), run_loss(torchs, None), strict=True
    ):
        assert (ours is None) == (want is None), name
        if ours is None or want is None or own is None:
            continue
        assert ours.dtype == case.z.dtype
        assert ours.shape == want.shape
        undefined = want.isnan()
        assert torch.equal(ours.isnan(), undefined), f"{name}: NaN in other places than torch's"
        ours, want, own = (t.double().masked_fill(undefined, 0.0) for t in (ours, want, own))
        error = (ours - want).abs().max().item()
        info = torch.finfo(case.z.dtype)
        floor = (
            info.eps * want.abs().max().item() + 2.0**-23 * z.numel() ** 0.5 * size + info.smallest_normal * info.eps
        )
        allowed = 2 * (own - want).abs().max().item() + floor
        assert error <= allowed, f"{name}: error {error:.3e} is over {allowed:.3e}"
