"""MLPEnsemble on the kernels: outputs and gradients of each member are those of the member alone, bit by bit."""

from __future__ import annotations

import pytest
import torch

import fastmlp
from fastmlp import use_backend
from tests.conftest import INTERPRETING, UNSIMULATED

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"), UNSIMULATED]


@pytest.mark.parametrize("rows", [9, 520], ids=["one launch of weight gradients", "a launch for each layer"])
@pytest.mark.parametrize("shared", [True, False], ids=["one x", "own x"])
def test_gradients(unsimulated, rows, shared):
    """The minimum over members is backpropagated, as in an ensemble of critics; x learns too."""
    torch.manual_seed(0)
    sizes = (5, 4, 2) if rows == 9 else (5, 2)
    model = fastmlp.MLPEnsemble(sizes, 2, "silu").to(unsimulated)
    x = torch.randn(rows, 5) if shared else torch.randn(2, rows, 5)
    x = x.to(unsimulated).requires_grad_()
    with use_backend("triton"):
        out = model(x)
        out.min(0).values.square().sum().backward()
        chosen = out.detach().argmin(0)
        parts = []
        for e, single in enumerate(model.unstack()):
            own = (x if shared else x[e]).detach().requires_grad_()
            got = single(own)
            torch.testing.assert_close(out[e], got, atol=0 if INTERPRETING else 1e-5, rtol=1e-5)
            (got * (chosen == e)).square().sum().backward()
            for theirs, ours in zip(model.parameters(), single.parameters(), strict=True):
                torch.testing.assert_close(theirs.grad[e], ours.grad, atol=1e-4, rtol=1e-4)
            parts.append(own.grad)
    want = sum(parts) if shared else torch.stack(parts)
    torch.testing.assert_close(x.grad, want, atol=1e-5, rtol=1e-4)


def test_compiled_whole_and_exported(unsimulated):
    """As operators of torch: one graph without a break, and a program for any batch."""
    model = fastmlp.MLPEnsemble((5, 4, 2), 3, "tanh").to(unsimulated)
    x = torch.randn(6, 5).to(unsimulated).requires_grad_()
    with use_backend("triton"):
        out = model(x)
        expected = torch.autograd.grad(out.square().sum(), [x, *model.parameters()])
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, out)
        torch.testing.assert_close(torch.autograd.grad(compiled.square().sum(), [x, *model.parameters()]), expected)
        x = x.detach()
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert "torch.ops.fastmlp.linear_fwd.default" in program.graph_module.code
        torch.testing.assert_close(program.module()(x[:4]), out[:, :4])
