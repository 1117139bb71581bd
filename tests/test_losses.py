"""fastmlp/losses.py beside torch's losses: results, gradients, dtypes and errors, most of cross-entropy."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import fastmlp
from fastmlp import reference, use_backend
from fastmlp.losses import CrossEntropyLoss, cross_entropy
from fastmlp.ops import torch_losses
from tests.conftest import HAS_GPU, INTERPRETING

C = 4
# Many rows of few classes are computed transposed. Torch computes few rows of labels.
SHAPES = [(C,), (5, C), (300, C), (3, C, 2), (2, C, 3, 2)]
REDUCTIONS = ["none", "mean", "sum"]


def logits(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=g) * 2).to(dtype).requires_grad_()


def labels(shape: tuple[int, ...], ignore_index: int | None = None, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, C, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=g)
    if ignore_index is not None and y.dim():
        y.view(-1)[1::3] = ignore_index
    return y


def probabilities(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()


def class_weight(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([0.5, 2.0, 1.0, 0.25], dtype=dtype)


def check_as_torch(z: Tensor, target: Tensor, **options) -> None:
    """Loss and gradients equal torch's for an upstream gradient that is not 1, with create_graph too."""
    inputs = [t for t in (z, target) if t.requires_grad]
    ours, torchs = cross_entropy(z, target, **options), F.cross_entropy(z, target, **options)
    assert ours.dtype == torchs.dtype
    torch.testing.assert_close(ours, torchs)
    upstream = torch.rand(torchs.shape, generator=torch.Generator().manual_seed(3)).to(torchs.dtype)
    expected = torch.autograd.grad(torchs, inputs, upstream)
    for create_graph in (False, True):
        got = torch.autograd.grad(ours, inputs, upstream, retain_graph=True, create_graph=create_graph)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
@pytest.mark.parametrize("ignore_index", [None, -100, 2])
def test_labels_as_torch(shape, reduction, label_smoothing, weighted, ignore_index):
    check_as_torch(
        logits(shape),
        labels(shape, ignore_index),
        weight=class_weight() if weighted else None,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weight"])
def test_probabilities_as_torch(shape, reduction, label_smoothing, weighted):
    weight = class_weight() if weighted else None
    check_as_torch(
        logits(shape), probabilities(shape), weight=weight, label_smoothing=label_smoothing, reduction=reduction
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["labels", "uint8", "probabilities"])
def test_dtypes(dtype, kind):
    z = logits((6, C), dtype)
    y = labels((6, C))
    target = {"labels": y, "uint8": y.to(torch.uint8), "probabilities": probabilities((6, C), dtype)}[kind]
    check_as_torch(z, target, label_smoothing=0.1 if kind != "uint8" else 0.0)


@pytest.mark.parametrize(
    ("z_dtype", "t_dtype", "w_dtype"),
    [
        (torch.float16, torch.float32, None),
        (torch.float32, torch.float64, torch.float16),
        (torch.float32, torch.float32, torch.float64),
    ],
    ids=str,
)
def test_mixed_dtypes_promote_as_torch(z_dtype, t_dtype, w_dtype):
    """The dtype equals torch's. The value may be more accurate, because log p is not rounded to float16 on the way."""
    z, t = logits((3, C), z_dtype), probabilities((3, C), t_dtype)
    weight = None if w_dtype is None else class_weight(w_dtype)
    ours, torchs = cross_entropy(z, t, weight), F.cross_entropy(z, t, weight)
    assert ours.dtype == torchs.dtype
    torch.testing.assert_close(ours, torchs, rtol=2e-3 if z_dtype == torch.float16 else 1e-6, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, [z, t]) for loss in (ours, torchs)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-3 if z_dtype == torch.float16 else 1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.2, "weight": class_weight(), "ignore_index": 1}], ids=str
)
def test_gradcheck(options, reduction):
    z, y, t = logits((3, C)), torch.tensor([2, 1, 3]), probabilities((3, C))
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, y, reduction=reduction, **options), [z])
    assert torch.autograd.gradgradcheck(lambda z: cross_entropy(z, y, reduction=reduction, **options), [z])
    options = {k: v for k, v in options.items() if k != "ignore_index"}
    assert torch.autograd.gradcheck(lambda z, t: cross_entropy(z, t, reduction=reduction, **options), [z, t])
    assert torch.autograd.gradgradcheck(lambda z, t: cross_entropy(z, t, reduction=reduction, **options), [z, t])


def test_upstream_strides():
    z, y = logits((6, C)), labels((6, C))
    for upstream in (torch.tensor(0.5, dtype=torch.float64).expand(6), torch.rand(12, dtype=torch.float64)[::2]):
        got, expected = (
            torch.autograd.grad(f(z, y, reduction="none"), z, upstream)[0] for f in (cross_entropy, F.cross_entropy)
        )
        torch.testing.assert_close(got, expected)


def test_strided_logits_and_targets():
    z = torch.randn(C, 6, dtype=torch.float64).t()[::2].requires_grad_()
    check_as_torch(z, labels((6, C))[::2])
    image = torch.randn(2, 3, 2, C, dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_()
    check_as_torch(image, labels((2, C, 3, 2)), reduction="none")


def test_retain_graph_and_accumulation():
    z, y = logits((5, C)), labels((5, C))
    loss = cross_entropy(z, y)
    loss.backward(retain_graph=True)
    once = z.grad.clone()
    loss.backward()
    torch.testing.assert_close(z.grad, 2 * once)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_saved_tensors_are_checked(monkeypatch):
    """A logit changed between forward and backward is noticed."""
    monkeypatch.setattr(torch_losses, "vector_width", lambda dtype: C + 1)  # not torch's own operator
    z, y = logits((300, C)), labels((300, C))
    hidden = z * 1
    loss = cross_entropy(hidden, y)
    with torch.no_grad():
        hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 7, 8, 10, 15, 16])
@pytest.mark.parametrize("width", [8, 16], ids=["AVX2", "AVX-512"])
def test_many_short_rows_on_a_cpu(monkeypatch, width, classes, dtype):
    """On both sides of the transposed softmax's limit gradients are contiguous and as near to float64 as torch's."""
    monkeypatch.setattr(torch_losses, "vector_width", lambda dtype: width)
    z = (torch.randn(4096, classes, generator=torch.Generator().manual_seed(4)) * 3).to(dtype).requires_grad_()
    y = torch.randint(0, classes, (4096,), generator=torch.Generator().manual_seed(5))
    wide = z.detach().double().requires_grad_()

    def loss_and_gradient(loss: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return loss.detach().double(), torch.autograd.grad(loss, z)[0]

    ours = loss_and_gradient(cross_entropy(z, y), z)
    torchs = loss_and_gradient(F.cross_entropy(z, y), z)
    right = loss_and_gradient(F.cross_entropy(wide, y), wide)
    assert ours[1].is_contiguous()
    for a, b, c in zip(ours, torchs, right, strict=True):
        floor = torch.finfo(dtype).eps * c.norm()
        assert (a.double() - c).norm() <= 2 * (b.double() - c).norm() + floor


def test_only_what_is_asked():
    z, t = logits((5, C)), probabilities((5, C))
    cross_entropy(z.detach(), t).backward()
    assert z.grad is None
    torch.testing.assert_close(t.grad, torch.autograd.grad(F.cross_entropy(z.detach(), t), t)[0])
    with torch.no_grad():
        assert not cross_entropy(z, t).requires_grad
    before = z.detach().clone()
    cross_entropy(z, t).backward()
    assert torch.equal(z.detach(), before)


def test_class_weight_that_requires_grad():
    """As in torch, class weights are differentiable with probabilities and raise an error with labels."""
    z, t, w = logits((5, C)), probabilities((5, C)), class_weight().requires_grad_()
    got, expected = (torch.autograd.grad(f(z, t, w), [z, t, w]) for f in (cross_entropy, F.cross_entropy))
    torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match="not differentiable"):
        cross_entropy(z, labels((5, C)), w)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, C), (2, C, 0)], ids=str)
def test_empty_batch(shape, reduction):
    for target in (labels(shape), probabilities(shape).detach()):
        z = logits(shape)
        ours, torchs = cross_entropy(z, target, reduction=reduction), F.cross_entropy(z, target, reduction=reduction)
        torch.testing.assert_close(ours, torchs, equal_nan=True)
        (dz,) = torch.autograd.grad(ours.sum(), z)
        assert dz.shape == shape


def test_special_values():
    inf = math.inf
    z = torch.tensor([[-inf, 0, 1], [-inf, -inf, -inf], [inf, 0, 0], [math.nan, 0, 0], [1e30, -1e30, 0]])
    for y in ([0] * 5, [2] * 5, [-100] * 5):
        for smoothing in (0.0, 0.1):
            results = []
            for f in (cross_entropy, F.cross_entropy):
                leaf = z.clone().requires_grad_()
                loss = f(leaf, torch.tensor(y), reduction="none", label_smoothing=smoothing)
                results.append((loss, *torch.autograd.grad(loss.sum(), leaf)))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b, equal_nan=True)


def test_all_rows_ignored():
    z = logits((3, C))
    y = torch.full((3,), -100)
    assert cross_entropy(z, y).isnan()
    assert cross_entropy(z, y, reduction="sum") == 0
    for smoothing in (0.0, 0.5):
        (dz,) = torch.autograd.grad(cross_entropy(z, y, label_smoothing=smoothing), z)
        assert (dz == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_and_returns_float32(dtype):
    z, t = logits((5, C), dtype), probabilities((5, C), dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_as_torch(z, labels((5, C)), weight=class_weight(torch.float16))
        check_as_torch(z, t)
        check_as_torch(logits((5, C)), labels((5, C)))
        loss = cross_entropy(z, labels((5, C)))
    assert loss.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")
@pytest.mark.parametrize("size_average", [None, False, True])
@pytest.mark.parametrize("reduce", [None, False, True])
def test_deprecated_arguments(size_average, reduce):
    z, y = logits((5, C)), labels((5, C))
    arguments = {"size_average": size_average, "reduce": reduce}
    torch.testing.assert_close(cross_entropy(z, y, **arguments), F.cross_entropy(z, y, **arguments))


def test_deprecated_arguments_warn():
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        cross_entropy(logits((5, C)), labels((5, C)), size_average=False)


def test_module():
    """The module has the arguments, the state_dict and the repr of torch.nn.CrossEntropyLoss."""
    options = {"weight": class_weight(), "ignore_index": 1, "reduction": "sum", "label_smoothing": 0.1}
    ours, torchs = CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert repr(ours) == repr(torchs)
    z, y = logits((5, C)), labels((5, C))
    torch.testing.assert_close(copy.deepcopy(ours)(z, y), torchs(z, y))


def test_torch_func():
    z, y = logits((5, C)).detach(), labels((5, C))
    torch.testing.assert_close(grad(cross_entropy)(z, y), grad(F.cross_entropy)(z, y))
    batch = torch.stack([z, 2 * z])
    torch.testing.assert_close(
        vmap(cross_entropy, (0, None))(batch, y), torch.stack([F.cross_entropy(z, y), F.cross_entropy(2 * z, y)])
    )


def test_compile_has_no_graph_break():
    compiled = torch.compile(cross_entropy, backend="eager", fullgraph=True)
    z, y = logits((5, C)), labels((5, C))
    try:
        torch.testing.assert_close(compiled(z, y), F.cross_entropy(z, y))
    finally:
        torch.compiler.reset()


Z, Y = torch.zeros(3, C), torch.tensor([0, 1, 2])
BAD = {
    "int32 labels": ((Z, Y.int()), {}),
    "bool labels": ((Z, Y.bool()), {}),
    "float labels": ((Z, Y.float()), {}),
    "too few labels": ((Z, Y[:2]), {}),
    "0-d label for rows": ((Z, Y[0]), {}),
    "labels of two dimensions": ((Z, Y[:, None]), {}),
    "two labels for one row": ((Z[0], Y[:2]), {}),
    "wrong positions": ((torch.zeros(3, C, 5), torch.zeros(3, 4, dtype=torch.long)), {}),
    "positions of too few dimensions": ((torch.zeros(3, C, 5, 2), torch.zeros(3, 5, dtype=torch.long)), {}),
    "other number of positions' rows": ((torch.zeros(3, C, 5), torch.zeros(2, 5, dtype=torch.long)), {}),
    "label too large": ((Z, torch.tensor([0, C, 1])), {}),
    "label too large with smoothing": ((Z, torch.tensor([0, C, 1])), {"label_smoothing": 0.1}),
    "label too large at a position": ((torch.zeros(1, C, 2), torch.tensor([[0, C]])), {}),
    "label of one row too large": ((Z[0], torch.tensor(C)), {}),
    "negative label": ((Z, torch.tensor([0, -1, 1])), {}),
    "no classes": ((Z[:, :0], Y), {}),
    "reduction": ((Z, Y), {"reduction": "average"}),
    "weight of another length": ((Z, Y), {"weight": torch.ones(3)}),
    "weight of two dimensions": ((Z, Y), {"weight": torch.ones(C, 1)}),
    "weight of another dtype": ((Z, Y), {"weight": torch.ones(C).double()}),
    "weight of integers": ((Z, Y), {"weight": torch.ones(C).long()}),
    "weight for probabilities": ((Z, Z), {"weight": torch.ones(3)}),
    "label_smoothing above 1": ((Z, Y), {"label_smoothing": 1.5}),
    "label_smoothing of text": ((Z, Y), {"label_smoothing": "a"}),
    "ignore_index of text": ((Z, Y), {"ignore_index": "a"}),
    "ignore_index with probabilities": ((Z, Z), {"ignore_index": 1}),
    "integer probabilities": ((Z, Z.long()), {}),
    "integer logits": ((Z.long(), Y), {}),
    "complex logits": ((Z.to(torch.complex64), Y), {}),
    "0-d logits": ((Z[0, 0], Y[0]), {}),
    "other device": ((Z, Y.to("meta")), {}),
    "weight on another device": ((Z, Y), {"weight": torch.ones(C, device="meta")}),
    "no tensor": (([1.0], Y), {}),
    "no tensor as target": ((Z, [1, 2, 3]), {}),
    "no tensor as weight": ((Z, Y), {"weight": [1.0] * C}),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_are_of_torchs_type(case):
    arguments, options = BAD[case]
    with pytest.raises((ValueError, RuntimeError, IndexError, TypeError)) as torchs:
        F.cross_entropy(*arguments, **options)
    with pytest.raises(torchs.type) as ours:
        cross_entropy(*arguments, **options)
    assert len(str(ours.value)) > 30


@pytest.mark.parametrize("label_smoothing", [-0.5, math.nan])
def test_label_smoothing_that_torch_ignores_is_an_error(label_smoothing):
    with pytest.raises(RuntimeError, match=r"label_smoothing must be between 0\.0 and 1\.0, got"):
        cross_entropy(Z, Y, label_smoothing=label_smoothing)


def test_out_of_range_label_is_named():
    with pytest.raises(IndexError, match=r"target 9 at position 1 .* from 0 to 3 for 4 classes"):
        cross_entropy(Z, torch.tensor([0, 9, 1]))
    with pytest.raises(IndexError, match=r"target -2 at position \[0, 1\] "):
        cross_entropy(torch.zeros(1, C, 2), torch.tensor([[0, -2]]))


def test_kernels_and_torch_agree(lane):
    """The same calls on the kernels: shapes, reductions, gradients and dtypes."""
    for shape in SHAPES:
        for reduction in REDUCTIONS[: 3 if shape == (5, C) else 1]:
            for target in (labels(shape, -100), probabilities(shape, torch.float32)):
                results = []
                for backend in ("triton", "torch"):
                    z = logits(shape, torch.float32).detach().to(lane).requires_grad_()
                    t = target.detach().to(lane).requires_grad_(target.requires_grad)
                    with use_backend(backend):
                        loss = cross_entropy(z, t, reduction=reduction, label_smoothing=0.1)
                    assert loss.shape == F.cross_entropy(z, t, reduction=reduction).shape
                    inputs = [v for v in (z, t) if v.requires_grad]
                    results.append((loss, *torch.autograd.grad(loss, inputs, torch.full_like(loss, 0.5))))
                for a, b in zip(*results, strict=True):
                    torch.testing.assert_close(a, b)


def test_second_derivatives_on_the_kernels(lane):
    z, y = logits((3, C), torch.float32).detach().to(lane).requires_grad_(), labels((3, C)).to(lane)
    with use_backend("triton"):
        (dz,) = torch.autograd.grad(cross_entropy(z, y), z, create_graph=True)
        (ddz,) = torch.autograd.grad(dz.square().sum(), z)
    zd = z.detach().double().requires_grad_()
    (dzd,) = torch.autograd.grad(reference.cross_entropy(zd, y), zd, create_graph=True)
    (expected,) = torch.autograd.grad(dzd.square().sum(), zd)
    torch.testing.assert_close(ddz.double(), expected, rtol=1e-4, atol=1e-6)


def test_kernels_check_labels_on_the_cpu(lane):
    if lane.type == "cpu":
        with use_backend("triton"), pytest.raises(IndexError, match="target 4 at position 0"):
            cross_entropy(torch.zeros(2, C), torch.tensor([C, 0]))
    else:
        loss = cross_entropy(torch.zeros(2, C, device=lane), torch.tensor([C, 0], device=lane), reduction="none")
        assert loss.isnan().tolist() == [True, False]


@pytest.mark.skipif(INTERPRETING or HAS_GPU, reason="the kernels can run here")
def test_kernels_on_the_cpu_are_an_error():
    with use_backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' needs tensors on a GPU"):
        cross_entropy(torch.zeros(2, C), torch.tensor([1, 0]))


#: Arguments of the modules by name, besides the reduction.
MODULES = {
    "MSELoss": [{}],
    "L1Loss": [{}],
    "HuberLoss": [{}, {"delta": 0.25}],
    "BCEWithLogitsLoss": [{}, {"weight": torch.rand(5, 1), "pos_weight": torch.tensor([0.5, 2.0, 3.0, 1.0])}],
}


class TestModules:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize(("name", "arguments"), [(name, a) for name, each in MODULES.items() for a in each])
    def test_as_torch(self, name, arguments, reduction):
        ours = getattr(fastmlp, name)(reduction=reduction, **arguments)
        theirs = getattr(torch.nn, name)(reduction=reduction, **arguments)
        assert repr(ours) == repr(theirs)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        a, y = torch.randn(5, C), torch.rand(5, C)
        for module in (ours, copy.deepcopy(ours)):
            results = []
            for loss in (module, theirs):
                leaf = a.clone().requires_grad_()
                out = loss(leaf, y)
                results.append((out, torch.autograd.grad(out.sum(), leaf)[0]))
            for got, want in zip(*results, strict=True):
                assert got.dtype == want.dtype
                torch.testing.assert_close(got, want)
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(a.bfloat16(), y).dtype == theirs(a.bfloat16(), y).dtype

    @pytest.mark.parametrize("name", ["MSELoss", "L1Loss", "BCEWithLogitsLoss"])
    @pytest.mark.parametrize(("size_average", "reduce"), [(True, None), (False, None), (None, False)])
    @pytest.mark.filterwarnings("ignore:size_average and reduce")
    def test_deprecated_arguments(self, name, size_average, reduce):
        ours, theirs = (
            getattr(module, name)(size_average=size_average, reduce=reduce) for module in (fastmlp, torch.nn)
        )
        assert ours.reduction == theirs.reduction
        a, y = torch.randn(5, C), torch.rand(5, C)
        torch.testing.assert_close(ours(a, y), theirs(a, y))

    def test_errors(self):
        with pytest.raises(TypeError, match="delta"):
            fastmlp.HuberLoss(delta="1")(torch.zeros(3), torch.zeros(3))
        with pytest.raises(RuntimeError, match="delta to be above 0"):
            fastmlp.HuberLoss(delta=-1.0)(torch.zeros(3), torch.zeros(3))
        with pytest.raises(ValueError, match="unknown reduction 'average'"):
            fastmlp.MSELoss(reduction="average")(torch.zeros(3), torch.zeros(3))
        with pytest.raises(TypeError):
            fastmlp.BCEWithLogitsLoss(weight=[1.0])
