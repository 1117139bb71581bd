"""Kernels read the values of a view such as ``z.conj().imag``, whose memory holds the negatives of its values."""

from __future__ import annotations

import torch

import fastmlp
from fastmlp.functional import cross_entropy, linear_act, mlp, mse_loss
from tests.conftest import UNSIMULATED
from tests.support.negated import negated

pytestmark = UNSIMULATED


def test_every_operation(unsimulated):
    x, w, y = (torch.randn(4, 4, device=unsimulated) for _ in range(3))
    labels, w = torch.arange(4, device=unsimulated), w.requires_grad_()
    with fastmlp.use_backend("triton"):
        for operation in (
            lambda x: linear_act(x, w, w[0], "tanh"),
            lambda x: mlp(x, [w, w], [None, w[1]], ["tanh", "relu"]),
            lambda x: cross_entropy(linear_act(y, w) * x, labels),
            lambda x: cross_entropy(linear_act(y, w), labels, x[0].abs(), label_smoothing=0.1),
            lambda x: mse_loss(linear_act(y, w), x, "none"),
        ):
            outputs = [operation(values) for values in (x, negated(x))]
            assert torch.equal(*outputs)
            upstream = torch.randn_like(outputs[0])
            grads = [torch.autograd.grad(outputs[i], w, g)[0] for i, g in enumerate((upstream, negated(upstream)))]
            assert torch.equal(*grads)
