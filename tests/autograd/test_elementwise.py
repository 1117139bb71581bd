"""mse_loss, l1_loss, huber_loss, bce_loss, bce_with_logits, multiclass_nll, softmax and softmax_squared_error."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastmlp import reference, use_backend
from fastmlp.functional import (
    bce_loss,
    bce_with_logits,
    huber_loss,
    l1_loss,
    mse_loss,
    multiclass_nll,
    softmax,
    softmax_squared_error,
)
from tests.support.harness import assert_within_budget

pytestmark = pytest.mark.usefixtures("own_nodes")

LOSSES = {
    "mse": (mse_loss, F.mse_loss),
    "l1": (l1_loss, F.l1_loss),
    "huber": (huber_loss, F.huber_loss),
    "bce": (bce_loss, F.binary_cross_entropy),
    "bce_with_logits": (bce_with_logits, F.binary_cross_entropy_with_logits),
}
REDUCTIONS = ("none", "mean", "sum")


def operands(loss: str, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    a, y = torch.randn(shape, generator=g, dtype=torch.float64), torch.randn(shape, generator=g, dtype=torch.float64)
    if loss in ("bce", "multiclass_nll"):
        a = torch.sigmoid(a)
    if loss not in ("mse", "l1", "huber"):
        y = torch.sigmoid(y)
    return a.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


def both_gradients(function, a: Tensor, y: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    a, y = a.detach().requires_grad_(), y.detach().requires_grad_()
    loss = function(a, y, reduction=reduction)
    loss.backward(torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape))
    return loss.detach(), a.grad, y.grad  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_torchs_results(loss, reduction, dtype):
    ours, theirs = LOSSES[loss]
    for shape in ((7, 5), (11,), (), (2, 3, 4)):
        a, y = operands(loss, *shape, dtype=dtype)
        got, da, dy = both_gradients(ours, a, y, reduction)
        want, da_torch, dy_torch = both_gradients(theirs, a, y, reduction)
        assert torch.equal(got, want), "the value differs from torch's"
        assert got.dtype == da.dtype == dy.dtype == dtype
        _, da_expected, dy_expected = both_gradients(theirs, a.double(), y.double(), reduction)
        assert_within_budget(da, da_expected, da_torch, reduction=1, what="gradient of the input")
        assert_within_budget(dy, dy_expected, dy_torch, reduction=1, what="gradient of the target")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", [*LOSSES, "multiclass_nll"])
def test_first_and_second_derivatives(loss, reduction):
    function = LOSSES[loss][0] if loss in LOSSES else multiclass_nll
    a, y = operands(loss, 3, 4)
    assert gradcheck(lambda a, y: function(a, y, reduction=reduction), (a, y))
    assert gradgradcheck(lambda a, y: function(a, y, reduction=reduction), (a, y))


def test_multiclass_nll_after_softmax_is_cross_entropy():
    z = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 4, 2, 2, 1, 3])
    one_hot = F.one_hot(y, 5).double()
    for reduction in REDUCTIONS:
        ours, theirs = multiclass_nll(softmax(z), one_hot, reduction), F.cross_entropy(z, y, reduction=reduction)
        torch.testing.assert_close(ours, theirs)
        (dz,) = torch.autograd.grad(ours.sum(), z)
        (dz_torch,) = torch.autograd.grad(theirs.sum(), z)
        torch.testing.assert_close(dz, dz_torch)


def test_a_term_of_a_class_that_is_not_the_target_is_zero():
    a = torch.tensor([[0.0, 1.0], [0.25, 0.75]], requires_grad=True)
    loss = multiclass_nll(a, torch.tensor([[0.0, 1.0], [0.0, 1.0]]), "sum")
    loss.backward()
    assert loss.item() == pytest.approx(-torch.tensor(0.75).log().item())
    assert a.grad is not None
    torch.testing.assert_close(a.grad, torch.tensor([[0.0, -1.0], [0.0, -4 / 3]]))


def test_a_term_of_no_target_is_zero_for_any_probability():
    a = torch.tensor([0.0, -1.0, torch.inf, torch.nan, 0.5], requires_grad=True)
    loss = multiclass_nll(a, torch.zeros(5))
    loss.backward()
    assert loss.item() == 0.0
    assert a.grad is not None
    assert a.grad.eq(0.0).all()


def test_second_derivatives_of_terms_of_one_hot_targets():
    a = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    (da,) = torch.autograd.grad(multiclass_nll(a, y), a, create_graph=True)
    (mixed,) = torch.autograd.grad(da.sum(), y)
    torch.testing.assert_close(mixed, -1 / a.detach())
    assert gradgradcheck(multiclass_nll, (a, y))


class TestSoftmax:
    def test_values_and_derivatives(self):
        z = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
        assert torch.equal(softmax(z), torch.softmax(z, -1))
        assert gradcheck(softmax, (z,))
        assert gradgradcheck(softmax, (z,))

    def test_gradient_of_rows_far_from_zero(self):
        z = torch.tensor([[1e4, 1e4 - 1, -1e4]], requires_grad=True)
        softmax(z)[0, 0].backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert z.grad[0, 0].item() == pytest.approx(torch.sigmoid(torch.tensor(1.0)).item() * 0.2689414, rel=1e-5)

    def test_equals_the_product_with_the_explicit_jacobian(self):
        p = torch.softmax(torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 0)
        dp = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        jacobian = torch.diag(p) - torch.outer(p, p)
        torch.testing.assert_close(reference.softmax_backward(dp, p), jacobian.t() @ dp)

    def test_errors(self):
        with pytest.raises(TypeError, match="expected the input"):
            softmax([1.0])  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="int64"):
            softmax(torch.tensor([1, 2]))


class TestSoftmaxSquaredError:
    @staticmethod
    def plain(z: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        rows = ((torch.softmax(z, 1) - y) ** 2).sum(1)
        return {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_against_autograd(self, reduction, dtype):
        a, y = operands("mse", 7, 5, dtype=dtype)
        got, dz, dy = both_gradients(softmax_squared_error, a, y, reduction)
        want, dz_torch, dy_torch = both_gradients(self.plain, a, y, reduction)
        expected, dz_expected, dy_expected = both_gradients(self.plain, a.double(), y.double(), reduction)
        assert_within_budget(got, expected, want, reduction=a.numel(), what="loss")
        assert_within_budget(dz, dz_expected, dz_torch, reduction=5, what="gradient of the logits")
        assert_within_budget(dy, dy_expected, dy_torch, reduction=1, what="gradient of the target")

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_first_and_second_derivatives(self, reduction):
        z, y = operands("mse", 3, 4)
        assert gradcheck(lambda z, y: softmax_squared_error(z, y, reduction), (z, y))
        assert gradgradcheck(lambda z, y: softmax_squared_error(z, y, reduction), (z, y))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
    def test_labels_are_one_hot_rows(self, dtype):
        z, _ = operands("mse", 4, 5)
        labels = torch.tensor([0, 4, 2, 2])
        got = softmax_squared_error(z, labels.to(dtype))
        want = self.plain(z, F.one_hot(labels, 5).double())
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(torch.autograd.grad(got, z)[0], torch.autograd.grad(want, z)[0])
        assert gradgradcheck(lambda z: softmax_squared_error(z, labels), (z,))

    def test_one_row_without_batch(self):
        z, y = operands("mse", 5)
        for reduction in REDUCTIONS:
            got = softmax_squared_error(z, y, reduction)
            assert got.shape == ()
            torch.testing.assert_close(got, self.plain(z.unsqueeze(0), y.unsqueeze(0)))
        assert softmax_squared_error(z, torch.tensor(3)).item() == pytest.approx(
            self.plain(z.unsqueeze(0), F.one_hot(torch.tensor([3]), 5)).item()
        )

    def test_errors(self):
        z = torch.randn(4, 5)
        with pytest.raises(IndexError, match="0 to 4, got 1 to 5"):
            softmax_squared_error(z, torch.tensor([1, 2, 5, 3]))
        with pytest.raises(ValueError, match=r"labels of shape \[4\]"):
            softmax_squared_error(z, torch.tensor([1, 2]))
        with pytest.raises(ValueError, match=r"\[M, C\]"):
            softmax_squared_error(torch.randn(2, 3, 4), torch.zeros(2, 3, 4))
        with pytest.raises(RuntimeError, match="int32"):
            softmax_squared_error(z, torch.zeros(4, dtype=torch.int32))
        with pytest.raises(ValueError, match="average"):
            softmax_squared_error(z, torch.zeros(4, dtype=torch.int64), "average")


class TestArguments:
    def test_nothing_is_broadcast(self):
        with pytest.raises(ValueError, match=r"\[3, 1\].*expand_as"):
            mse_loss(torch.zeros(3, 4), torch.zeros(3, 1))

    def test_dtypes(self):
        with pytest.raises(RuntimeError, match="same dtype"):
            bce_loss(torch.zeros(3), torch.zeros(3).double())
        with pytest.raises(RuntimeError, match="floating-point target"):
            l1_loss(torch.zeros(3), torch.zeros(3, dtype=torch.int64))

    def test_reduction(self):
        with pytest.raises(ValueError, match=r"'average'.*none, mean, sum"):
            mse_loss(torch.zeros(3), torch.zeros(3), "average")

    def test_not_tensors(self):
        with pytest.raises(TypeError, match="the target"):
            mse_loss(torch.zeros(3), [0.0] * 3)  # type: ignore[arg-type]

    def test_probabilities_outside_their_range(self):
        with pytest.raises(RuntimeError, match=r"got -0\.5 to 2"):
            bce_loss(torch.tensor([-0.5, 2.0]), torch.zeros(2))

    def test_empty(self):
        assert mse_loss(torch.zeros(0), torch.zeros(0)).isnan()
        assert l1_loss(torch.zeros(0), torch.zeros(0), "sum").item() == 0
        assert softmax_squared_error(torch.zeros(0, 3), torch.zeros(0, 3), "none").shape == (0,)


#: Bad calls, to which torch too objects; ``loss`` is ours or torch's.
BAD_CALLS = {
    "shapes": lambda loss: loss(torch.zeros(3, 4), torch.zeros(4, 3)),
    "devices": lambda loss: loss(torch.zeros(3), torch.zeros(3, device="meta")),
    "reduction": lambda loss: loss(torch.zeros(3), torch.zeros(3), reduction="average"),
    "integers": lambda loss: loss(torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)),
    "complex input": lambda loss: loss(torch.zeros(3, dtype=torch.complex64), torch.zeros(3)),
    "weight shape": lambda loss: loss(torch.zeros(3, 4), torch.zeros(3, 4), weight=torch.ones(3)),
    "weight of more dimensions": lambda loss: loss(torch.zeros(3), torch.zeros(3), weight=torch.ones(2, 3)),
    "weight device": lambda loss: loss(torch.zeros(3), torch.zeros(3), weight=torch.ones(3, device="meta")),
    "pos_weight": lambda loss: loss(torch.zeros(3, 4), torch.zeros(3, 4), pos_weight=torch.ones(3)),
    "pos_weight number": lambda loss: loss(torch.zeros(3), torch.zeros(3), pos_weight=2.0),
    "delta": lambda loss: loss(torch.zeros(3), torch.zeros(3), delta=0.0),
    "delta NaN": lambda loss: loss(torch.zeros(3), torch.zeros(3), delta=math.nan),
    "delta text": lambda loss: loss(torch.zeros(3), torch.zeros(3), delta="1"),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("loss", LOSSES)
def test_errors_are_of_torchs_type(loss, case):
    ours, theirs = LOSSES[loss]
    arguments = case.split()[0]
    if arguments == "pos_weight" and loss != "bce_with_logits":
        pytest.skip("has no such argument")
    if arguments == "delta" and loss != "huber":
        pytest.skip("has no such argument")
    if arguments == "weight" and loss == "bce":
        pytest.skip("ours has no such argument")
    if (loss, case) == ("l1", "complex input"):
        pytest.skip("torch's accepts it")
    with pytest.raises(Exception) as error:
        BAD_CALLS[case](theirs)
    kind = RuntimeError if case == "complex input" and loss == "bce" else type(error.value)
    with pytest.raises(kind, match=r"expected|unknown reduction"):
        BAD_CALLS[case](ours)


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class TestPromotion:
    """Input and target of two dtypes: the dtype of the loss and its value are torch's."""

    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("reduction", ["none", "mean"])
    @pytest.mark.parametrize("loss", LOSSES)
    def test_as_torch(self, loss, reduction, autocast):
        ours, theirs = LOSSES[loss]
        a, y = (t.detach() for t in operands(loss, 5, 4))
        for dtypes in itertools.product(FLOATS, FLOATS):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                leaves = [t.to(dtype).requires_grad_() for t, dtype in zip((a, y), dtypes, strict=True)]
                try:
                    want = theirs(*leaves, reduction=reduction)
                except RuntimeError:
                    with pytest.raises(RuntimeError, match="same dtype"):
                        ours(*leaves, reduction=reduction)
                    continue
                got = ours(*leaves, reduction=reduction)
            assert got.dtype == want.dtype, dtypes
            exact = theirs(*(t.double() for t in leaves), reduction=reduction)
            assert_within_budget(got, exact, want, reduction=20, what=f"loss of {dtypes}")
            grads = torch.autograd.grad(got.sum(), leaves)
            expected = torch.autograd.grad(exact.sum(), leaves)
            for grad, leaf, right in zip(grads, leaves, expected, strict=True):
                assert grad.dtype == leaf.dtype
                # One rounding of the loss's gradient, and one of the operand's.
                loss_grad_eps = max(torch.finfo(dtype).eps for dtype in (want.dtype, *dtypes))
                torch.testing.assert_close(grad.double(), right.double(), rtol=4 * loss_grad_eps, atol=loss_grad_eps)

    @pytest.mark.parametrize("function", [softmax_squared_error, multiclass_nll])
    def test_losses_that_torch_lacks(self, function):
        a, y = (t.detach() for t in operands("multiclass_nll", 5, 4))
        for dtypes in itertools.product(FLOATS, FLOATS):
            pair = [t.to(dtype) for t, dtype in zip((a, y), dtypes, strict=True)]
            promoted = torch.promote_types(*dtypes)
            got = function(*pair)
            assert got.dtype == promoted
            torch.testing.assert_close(got, function(*(t.to(promoted) for t in pair)))
            with torch.autocast("cpu", torch.bfloat16):
                assert function(*pair).dtype == torch.promote_types(promoted, torch.float32)

    def test_functions_of_functions(self):
        a, y = (t.detach() for t in operands("mse", 5, 4))
        rows = torch.func.vmap(mse_loss)(a.float(), y.bfloat16())
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows, ((a.float() - y.bfloat16()) ** 2).mean(1))


class TestWeights:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("loss", ["mse", "l1", "huber", "bce_with_logits"])
    def test_weight(self, loss, reduction):
        ours, theirs = LOSSES[loss]
        weight = torch.rand(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        got = both_gradients(lambda *t, **k: ours(*t, weight=weight, **k), *operands(loss, 7, 5), reduction)
        want = both_gradients(lambda *t, **k: theirs(*t, weight=weight, **k), *operands(loss, 7, 5), reduction)
        for value, expected in zip(got, want, strict=True):
            torch.testing.assert_close(value, expected)

    @pytest.mark.parametrize("reduction", REDUCTIONS)
    def test_pos_weight(self, reduction):
        a, y = operands("bce_with_logits", 7, 5)
        pos_weight, weight = torch.arange(1, 6).double(), torch.linspace(0, 1, 7).double().unsqueeze(1)
        losses = -weight * (pos_weight * y * F.logsigmoid(a) + (1 - y) * F.logsigmoid(-a))
        want = {"none": losses, "sum": losses.sum(), "mean": losses.mean()}[reduction]
        torch.testing.assert_close(bce_with_logits(a, y, weight, pos_weight, reduction), want)

    def test_reduction_in_its_old_place(self):
        a, y = operands("bce_with_logits", 7, 5)
        assert torch.equal(bce_with_logits(a, y, "sum"), bce_with_logits(a, y, reduction="sum"))


class TestDelta:
    @pytest.mark.parametrize("reduction", REDUCTIONS)
    @pytest.mark.parametrize("delta", [0.01, 0.5, 2, math.inf, torch.tensor(0.5)])
    def test_as_torch(self, delta, reduction):
        a, y = operands("huber", 7, 5)
        with torch.no_grad():
            y[0] = a[0]
            y[1] = a[1] + 0.5
        got = both_gradients(lambda *t, **k: huber_loss(*t, delta=delta, **k), a, y, reduction)
        want = both_gradients(lambda *t, **k: F.huber_loss(*t, delta=float(delta), **k), a, y, reduction)
        for value, expected in zip(got, want, strict=True):
            torch.testing.assert_close(value, expected)
        assert gradgradcheck(lambda a: huber_loss(a, y[2:], reduction, delta), (a[2:].detach().requires_grad_(),))

    def test_torch_func(self):
        a, y = (t.detach() for t in operands("huber", 7, 5))
        rows = torch.func.vmap(lambda a, y: huber_loss(a, y, delta=0.5))(a, y)
        torch.testing.assert_close(rows, F.huber_loss(a, y, reduction="none", delta=0.5).mean(1))


class TestModes:
    def test_autocast_computes_in_float32(self):
        a, y = operands("mse", 7, 5, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            assert bce_with_logits(a, y).dtype == torch.float32
            assert softmax_squared_error(a, y).dtype == torch.float32

    def test_torch_func(self):
        a, y = operands("mse", 7, 5)
        rows = torch.func.vmap(lambda a, y: mse_loss(a, y))(a, y)
        torch.testing.assert_close(rows, ((a - y) ** 2).mean(1))
        gradient = torch.func.grad(lambda a: softmax_squared_error(a, y.detach()))(a.detach())
        want = torch.autograd.grad(softmax_squared_error(a, y.detach()), a)[0]
        torch.testing.assert_close(gradient, want)

    def test_frozen_target_gets_no_gradient(self):
        a, y = operands("mse", 7, 5)
        assert mse_loss(a, y.detach()).backward() is None
        assert y.grad is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_on_the_kernels(lane, reduction):
    """Every loss and gradient on the Triton backend against plain torch, with odd shapes and upstream gradients."""
    with use_backend("triton"):
        for name, (function, theirs) in LOSSES.items():
            a, y = (t.detach().to(lane) for t in operands(name, 2, 3, 17, dtype=torch.float32))
            got = both_gradients(function, a, y, reduction)
            want = both_gradients(theirs, a, y, reduction)
            for ours, plain in zip(got, want, strict=True):
                torch.testing.assert_close(ours, plain, msg=name)
        a, y = (t.detach().to(lane) for t in operands("huber", 7, 17, dtype=torch.float32))
        got = both_gradients(lambda *t, **k: huber_loss(*t, delta=0.5, **k), a, y, reduction)
        want = both_gradients(lambda *t, **k: F.huber_loss(*t, delta=0.5, **k), a, y, reduction)
        for ours, plain in zip(got, want, strict=True):
            torch.testing.assert_close(ours, plain)
        z, y = (t.detach().to(lane) for t in operands("mse", 7, 17, dtype=torch.float32))
        got = both_gradients(softmax_squared_error, z, y, reduction)
        want = both_gradients(TestSoftmaxSquaredError.plain, z, y, reduction)
        for ours, plain in zip(got, want, strict=True):
            torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0,)])
def test_empty_on_the_kernels(lane, reduction, shape):
    functions = {name: loss for name, (loss, _) in LOSSES.items()} | {"multiclass_nll": multiclass_nll}
    for name, function in {**functions, "softmax_squared_error": softmax_squared_error}.items():
        a, y = torch.ones(shape), torch.ones(shape)
        with use_backend("torch"):
            want = both_gradients(function, a, y, reduction)
        with use_backend("triton"):
            got = both_gradients(function, a.to(lane), y.to(lane), reduction)
        for ours, plain in zip(got, want, strict=True):
            torch.testing.assert_close(ours.cpu(), plain, equal_nan=True, msg=name)
