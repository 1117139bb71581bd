"""The products of a layer of an ensemble on plain torch: batched, or member by member as an MLP's."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import cpu
from .cpu_member_span import MemberLayer

#: Batches of so many rows with slimmer weights update in two passes (``fastmlp.cpu.products``).
_SLIM_ROWS, _SLIM = 64, 16


class Batched:
    """The products of one layer for ``m`` rows of each member, into buffers.

    16 bits that the processor cannot multiply, and all 16 bits in gradients of float32 masters, are multiplied in
    float32.

    Args:
        layer: the ensemble's layer; ``weight``, ``bias`` and ``master`` are the members' part of its tensors.
        z, dz, dx: [e, m, N], [e, m, N] and [e, m, K] for Z, dZ and, where there is a layer below, dX.
        grad: [e, N, K] for dW, where it is always stored; None for plain SGD, which calls ``update``.
    """

    def __init__(
        self,
        m: int,
        layer: MemberLayer,
        weight: Tensor,
        bias: Tensor | None,
        master: Tensor,
        z: Tensor,
        dz: Tensor,
        dx: Tensor | None,
        grad: Tensor | None,
    ) -> None:
        self._weight, self._bias, self._master = weight, None if bias is None else bias.unsqueeze(1), master
        wide = cpu.product_dtype(weight.dtype, weight.device) if weight.dtype == master.dtype else master.dtype
        self._narrow_z, self._narrow_dz, self._narrow_dx = z, dz, dx
        (e, n, k), self._wide = weight.shape, wide != weight.dtype
        self._w, self._b, self._z, self._dz, self._dx = weight, self._bias, z, dz, dx
        if self._wide:
            new = weight.new_empty
            self._w = new((e, n, k), dtype=wide)
            self._b = None if bias is None else new((e, 1, n), dtype=wide)
            self._x, self._z, self._dz = (new((e, m, c), dtype=wide) for c in (k, n, n))
            self._dx = None if dx is None else new((e, m, k), dtype=wide)
        self._w_t, self._dz_t = self._w.mT, self._dz.mT
        slim = m >= _SLIM_ROWS and min(n, k) < _SLIM
        self._dw = torch.empty_like(master) if grad is None and slim and layer.train_w else None
        #: Where dW^T is computed.
        self._flat = self._w.new_empty((e, k, n)) if k < _SLIM <= n else None

    def linear(self, x: Tensor) -> Tensor:
        """Z = X W^T + b."""
        if self._wide:
            self._w.copy_(self._weight)
            x = self._x.copy_(x)
            if self._b is not None and self._bias is not None:
                self._b.copy_(self._bias)
        if self._b is None:
            torch.bmm(x, self._w_t, out=self._z)
        else:
            torch.baddbmm(self._b, x, self._w_t, out=self._z)
        return self._narrow_z.copy_(self._z) if self._wide else self._z

    def dgrad(self) -> Tensor:
        """DX = dZ W; ``linear`` has been called."""
        assert self._dx is not None
        if not self._wide:
            return torch.bmm(self._dz, self._w, out=self._dx)
        assert self._narrow_dx is not None
        return self._narrow_dx.copy_(torch.bmm(self._dz.copy_(self._narrow_dz), self._w, out=self._dx))

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(dZ^T, X) of the weight's gradient; ``linear`` has been called with the same X."""
        if not self._wide:
            return self._dz_t, x
        self._dz.copy_(self._narrow_dz)
        return self._dz_t, self._x

    def _wgrad(self, x: Tensor, into: Tensor) -> Tensor:
        """DZ^T X in ``into``, or in scratch memory of its shape; BLAS is several times as fast at a long first axis."""
        dz_t, x = self._operands(x)
        if self._flat is None:
            return torch.bmm(dz_t, x, out=into)
        torch.bmm(x.mT, dz_t.mT, out=self._flat)
        return self._flat.mT

    def wgrad(self, x: Tensor, into: Tensor) -> None:
        """DZ^T X in ``into``."""
        made = self._wgrad(x, into)
        if made is not into:
            into.copy_(made)

    def update(self, x: Tensor, rate: float) -> None:
        """W -= rate dZ^T X."""
        if self._dw is None:
            self._master.baddbmm_(*self._operands(x), alpha=-rate)
        else:
            self._master.add_(self._wgrad(x, self._dw), alpha=-rate)


class Each(Batched):
    """The same, member by member, for products so long that the choice of the library counts more than the calls."""

    def __init__(
        self,
        m: int,
        layer: MemberLayer,
        weight: Tensor,
        bias: Tensor | None,
        master: Tensor,
        z: Tensor,
        dz: Tensor,
        dx: Tensor | None,
        grad: Tensor | None,
    ) -> None:
        narrow = weight.dtype != master.dtype
        self._all_z, self._all_dx = z, dx
        self._zs, self._dzs, self._dxs = z.unbind(), dz.unbind(), [] if dx is None else dx.unbind()
        kind = cpu.product_dtype(weight.dtype, weight.device) if narrow else master.dtype
        scratch = torch.empty(master.shape[1:], dtype=kind, device=master.device)
        self._grads = None if grad is None or not layer.train_w else grad.unbind()
        self._products = []
        for e in range(len(weight)):
            # As ``cpu_plan.Plan``: dW goes into the gradient itself, where the dtypes agree.
            dw, wide = (scratch, master[e]) if narrow and layer.train_w else (None, None)
            if self._grads is not None:
                own = self._grads[e]
                dw, wide = (scratch, own) if narrow and kind != own.dtype else (own, None)
            b, into = None if bias is None else bias[e], None if dx is None else self._dxs[e]
            update = grad is None and layer.train_w
            self._products.append(
                cpu.layer_products(m, weight[e], b, "identity", self._zs[e], into, update=update, dw=dw, wide=wide)
            )

    def linear(self, x: Tensor) -> Tensor:
        """Z = X W^T + b."""
        for products, of_member, z in zip(self._products, x.unbind(), self._zs, strict=True):
            made = products.linear(of_member)
            if made is not z:
                z.copy_(made)
        return self._all_z

    def dgrad(self) -> Tensor:
        """DX = dZ W."""
        assert self._all_dx is not None
        for products, dz, dx in zip(self._products, self._dzs, self._dxs, strict=True):
            assert products.dgrad is not None
            made = products.dgrad(dz)
            if made is not dx:
                dx.copy_(made)
        return self._all_dx

    def wgrad(self, x: Tensor, into: Tensor) -> None:
        """DZ^T X in ``into``."""
        grads = into.unbind() if self._grads is None else self._grads
        for products, dz, of_member, dw in zip(self._products, self._dzs, x.unbind(), grads, strict=True):
            if products.wgrad is None:
                self._mm(dz, of_member, dw)
                continue
            made = products.wgrad(dz, of_member)
            if made is not dw:
                dw.copy_(made)

    @staticmethod
    def _mm(dz: Tensor, x: Tensor, dw: Tensor) -> None:
        """DZ^T X for plain SGD, whose gradients are stored by ``gradients`` only."""
        if dz.dtype == dw.dtype:
            torch.mm(dz.t(), x, out=dw)
        else:
            torch.mm(dz.t().to(dw.dtype), x.to(dw.dtype), out=dw)

    def update(self, x: Tensor, rate: float) -> None:
        """W -= rate dZ^T X."""
        for products, dz, of_member in zip(self._products, self._dzs, x.unbind(), strict=True):
            assert products.update is not None
            products.update(dz, of_member, rate)
