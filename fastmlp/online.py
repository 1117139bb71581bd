"""Training one sample at a time, exactly, without touching the big weight matrices at every sample.

The update of a sample has rank one: with inputs a_j of a layer and gradients d_j = lr_j dL/dz of its pre-activations,

    W_j = W_0 - sum_{i<j} d_i a_i^T        after j samples of a block that began with W_0

so within a block the products that sample j needs are those of W_0, corrected through inner products of vectors:

    z_j      = W_j a_j   = W_0 a_j   - D^T (A a_j)         rows of D [j, N] and A [j, K]: d_i and a_i for i < j
    dL/da_j  = W_j^T d_j = W_0^T d_j - A^T (D d_j)

and the block ends with one matrix product W -= D^T A. These are the sums of the plain loop in another order, so the
results are equal up to rounding. The recurrence saves memory traffic, which is all that a single sample costs: the
plain loop reads and writes every W at every sample.

- First layer: its inputs X are known in advance, so W_0 x_j for the whole block is one product, and so is the Gram
  matrix X X^T, which contains each A a_j. A block touches W three times.
- Later layers: a_j depends on all samples before, so every sample reads W_0 twice, but never writes it. The rows of A
  lie below W_0. So one matrix-vector product gives W_0 a_j and A a_j, and another one W_0^T d_j and the correction.
- Layers with few weights (`SMALL`) are cheaper updated in place.

Biases are a last column of W, with 1 as last entry of every a_j. d_j is scaled by lr_j at the loss, which scales all
gradients, since back-propagation is linear.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import reference
from .activations import ACTIVATIONS
from .base.arguments import check_activation, check_classes, check_input, check_network, check_rows, check_tensor
from .base.memory import sharing

__all__ = ["BLOCK", "SMALL", "online_epoch"]

#: Samples per block, unless asked otherwise: the fastest on 784-512-512-10, where 16 to 64 are within 15 % of it.
BLOCK = 32
#: Later layers of at most this many weights are updated in place at every sample.
SMALL = 16_384


class _Layer:
    """One layer during an epoch: a working copy of its weights, and views made once for every sample of a block.

    ``inputs[j]`` is a_j of length K, and ``augmented[j]`` the same with the bias's 1 behind; the layer below writes
    there. ``outputs[j]`` are the next layer's inputs. ``dz[j]`` receives d_j. With the identity, z and a are the same
    memory, and so are da and dz.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str, rows: int, extra: int) -> None:
        self.weight, self.bias, self.f = weight, bias, ACTIVATIONS[activation]
        self.linear = activation == "identity"
        self.N, self.K = weight.shape
        self.width = self.K + (bias is not None)
        # Rows of 64-byte multiples: unaligned rows double the time of a matrix-vector product.
        stride = math.ceil(self.width * weight.element_size() / 64) * 64 // weight.element_size()
        self.storage = weight.new_zeros(self.N + extra, stride)
        self.copy = self.storage[: self.N, : self.width]
        self.copy[:, : self.K] = weight
        if bias is not None:
            self.copy[:, self.K] = bias
        self.factors = weight.new_zeros(rows, self.N + extra)  # D, and D d_j beside d_j where a layer wants it
        self.dz = [row[: self.N] for row in self.factors]
        self.z = weight.new_zeros(self.N + extra)
        self.da = weight.new_zeros(self.N)
        self.activate = None if self.linear else self.f.into
        self.derive = None if self.linear else self.f.backward_into

    def take_inputs(self, rows: Tensor) -> None:
        """Make the rows of a [count, width] tensor this layer's inputs."""
        if self.bias is not None:
            rows[:, self.K] = 1
        self.augmented = list(rows)
        self.inputs = [row[: self.K] for row in rows]

    def connect(self, below: _Layer | None, outputs: Sequence[Tensor]) -> None:
        """Fix where the activations go, and dL/da of the layer below."""
        z = [self.z[: self.N]] * len(outputs)
        self.outputs, self.z_for = outputs, outputs if self.linear else z
        self.saved = z if self.f.saved == "z" else outputs
        self.gradient = self.dz if self.linear else [self.da] * len(outputs)
        self.gradient_below = [] if below is None else below.gradient

    def start(self, count: int) -> None:
        """Called before the first sample of a block of ``count``."""

    def forward(self, j: int) -> Tensor:
        """Z from inputs[j]."""
        raise NotImplementedError

    def backward(self, j: int) -> None:
        """From d_j, dL/da of the layer below, and the update where it is made in place."""

    def finish(self, count: int) -> None:
        """Apply the updates of a block of ``count`` samples."""

    def write_back(self) -> None:
        """Put the trained values into the caller's tensors."""
        self.weight.copy_(self.copy[:, : self.K])
        if self.bias is not None:
            self.bias.copy_(self.copy[:, self.K])


class _FirstLayer(_Layer):
    """The inputs of a block are known before it starts."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str, rows: int) -> None:
        super().__init__(weight, bias, activation, rows, 0)
        self.x = weight.new_zeros(rows, self.storage.shape[1])[:, : self.width]
        self.take_inputs(self.x)
        self.products = weight.new_zeros(rows, self.N)  # W_0 x_j
        self.gram = weight.new_zeros(rows, rows)
        self.product = list(self.products)
        self.before = [self.gram[j, :j] for j in range(rows)]  # A a_j
        self.factors_t = [self.factors[:j].t() for j in range(rows)]

    def load(self, images: Tensor) -> None:
        """The inputs of the next block: [count, K], or uint8 pixels."""
        x = self.x[: len(images), : self.K].copy_(images)
        if images.dtype == torch.uint8:
            x.div_(255)

    def start(self, count: int) -> None:
        x = self.x[:count]
        torch.mm(x, self.copy.t(), out=self.products[:count])
        torch.mm(x, x.t(), out=self.gram[:count, :count])

    def forward(self, j: int) -> Tensor:
        return torch.addmv(self.product[j], self.factors_t[j], self.before[j], alpha=-1, out=self.z_for[j])

    def finish(self, count: int) -> None:
        self.copy.addmm_(self.factors[:count].t(), self.x[:count], alpha=-1)


class _DeferredLayer(_Layer):
    """The updates of a block stay factors; the inputs are kept in the rows below W_0."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str, rows: int) -> None:
        super().__init__(weight, bias, activation, rows, rows)
        N, stacked = self.N, self.storage[:, : self.width]
        self.take_inputs(stacked[N:])
        self.stacked = [stacked[: N + j] for j in range(rows)]  # W_0 over A
        self.stacked_t = [stacked[: N + j, : self.K].t() for j in range(rows)]
        self.factors_above = [self.factors[:j, :N] for j in range(rows)]  # D
        self.factors_t = [above.t() for above in self.factors_above]
        self.products = [self.z[: N + j] for j in range(rows)]  # W_0 a_j over A a_j
        self.product, self.before = self.z[:N], [self.z[N : N + j] for j in range(rows)]
        self.dz_and_tail = [self.factors[j, : N + j] for j in range(rows)]  # d_j over -D d_j
        self.tail = [self.factors[j, N : N + j] for j in range(rows)]

    def forward(self, j: int) -> Tensor:
        torch.mv(self.stacked[j], self.augmented[j], out=self.products[j])
        return torch.addmv(self.product, self.factors_t[j], self.before[j], alpha=-1, out=self.z_for[j])

    def backward(self, j: int) -> None:
        tail = self.tail[j]
        torch.addmv(tail, self.factors_above[j], self.dz[j], beta=0, alpha=-1, out=tail)
        torch.mv(self.stacked_t[j], self.dz_and_tail[j], out=self.gradient_below[j])

    def finish(self, count: int) -> None:
        self.copy.addmm_(self.factors[:count, : self.N].t(), self.storage[self.N :][:count, : self.width], alpha=-1)


class _SmallLayer(_Layer):
    """Updated in place at every sample."""

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str, rows: int) -> None:
        super().__init__(weight, bias, activation, 1, 0)
        self.take_inputs(weight.new_zeros(1, self.width))
        self.dz, self.inputs, self.augmented = self.dz * rows, self.inputs * rows, self.augmented * rows
        self.copy_t = self.copy[:, : self.K].t()

    def forward(self, j: int) -> Tensor:
        return torch.mv(self.copy, self.augmented[j], out=self.z_for[j])

    def backward(self, j: int) -> None:
        torch.mv(self.copy_t, self.dz[j], out=self.gradient_below[j])
        self.copy.addr_(self.dz[j], self.augmented[j], alpha=-1)


@torch.no_grad()
def online_epoch(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    images: Tensor,
    labels: Tensor,
    lr: float | Sequence[float],
    order: Tensor | None = None,
    block: int = BLOCK,
    losses: Tensor | None = None,
) -> Tensor:
    """One pass of stochastic gradient descent with softmax cross-entropy, one sample per step.

    Step j updates every W_l -= lr_j dL/dW_l and b_l -= lr_j dL/db_l for the loss L of one sample at the parameters
    that the steps before have left, as "Introduction to Neural Networks" and "Explanatory Notes for 6.390" do. The
    result equals that loop's up to rounding. The parameters change, in place, when the whole pass is done: an exception
    leaves them as they were.

    Args:
        weights: L tensors [n_l, n_{l-1}], float32 or float64, on the CPU; any strides.
        biases: L tensors [n_l], or None for a layer without one.
        activations: L names as in ``functional.linear_act``.
        images: [count, n_0] in the weights' dtype, or uint8 pixels, which count as x / 255.
        labels: int64 [count], each in [0, n_L).
        lr: the step size of all steps, or one per step.
        order: int64 [steps], the rows of images and labels to use; default all, in order. Rows may repeat.
        block: steps between two updates of the large matrices; the result depends on it by rounding only.
        losses: [steps] in the weights' dtype, to write each step's loss into; default none.

    Returns:
        The mean over the steps of L before each update, 0-d in the weights' dtype; NaN if there are no steps.

    Raises:
        ValueError: unknown activations, sequences of different lengths, a block below 1, more or fewer lr than steps,
            parameters of which one begins within another.
        TypeError: arguments that are not tensors.
        IndexError: a label outside [0, n_L), an entry of order outside [0, count).
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    rows, targets = _checked(weights, biases, activations, images, labels, order, block)
    steps = len(targets)
    rates = [float(rate) for rate in lr] if isinstance(lr, Iterable) else [float(lr)] * steps
    if len(rates) != steps:
        raise ValueError(f"expected one lr, or one for each of the {steps} steps, got {len(rates)}")

    dtype, block = weights[0].dtype, max(1, min(block, steps))
    first, *later = (
        _layer(weight.detach(), None if bias is None else bias.detach(), activation, block, first=index == 0)
        for index, (weight, bias, activation) in enumerate(zip(weights, biases, activations, strict=True))
    )
    assert isinstance(first, _FirstLayer)
    layers = [first, *later]
    last, classes = layers[-1], layers[-1].N
    hot = list(torch.eye(classes, dtype=dtype, device="cpu"))
    probabilities = torch.empty(classes, dtype=dtype, device="cpu")
    logits = torch.empty(block, classes, dtype=dtype, device="cpu")
    for i, layer in enumerate(layers):
        layer.connect(layers[i - 1] if i else None, list(logits) if layer is last else layers[i + 1].inputs)
    down = layers[::-1]
    total = torch.zeros((), dtype=torch.float64, device="cpu")
    for begin in range(0, steps, block):
        count = min(block, steps - begin)
        first.load(images[begin : begin + count] if rows is None else images[rows[begin : begin + count]])
        for layer in layers:
            layer.start(count)
        for j in range(count):
            for layer in layers:
                z = layer.forward(j)
                if layer.activate is not None:
                    layer.activate(z, layer.outputs[j])
            # dL/dlogits = softmax - onehot, times lr_j, so that everything below is.
            torch.softmax(last.outputs[j], 0, out=probabilities)
            torch.sub(probabilities, hot[targets[begin + j]], out=last.gradient[j]).mul_(rates[begin + j])
            for layer in down:
                if layer.derive is not None:
                    layer.derive(layer.da, layer.saved[j], layer.dz[j])
                layer.backward(j)
        for layer in layers:
            layer.finish(count)
        block_losses = reference.cross_entropy(
            logits[:count], torch.tensor(targets[begin : begin + count], device="cpu"), reduction="none"
        )
        if losses is not None:
            losses[begin : begin + count] = block_losses
        total += block_losses.sum().double()
    for layer in layers:
        layer.write_back()
    return (total / steps).to(dtype)


def _layer(weight: Tensor, bias: Tensor | None, activation: str, rows: int, *, first: bool) -> _Layer:
    if first:
        return _FirstLayer(weight, bias, activation, rows)
    if weight.numel() <= SMALL:
        return _SmallLayer(weight, bias, activation, rows)
    return _DeferredLayer(weight, bias, activation, rows)


def _checked(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    images: Tensor,
    labels: Tensor,
    order: Tensor | None,
    block: int,
) -> tuple[Tensor | None, list[int]]:
    """(rows to use or None for all, their labels as ints), after checking everything."""
    if block < 1:
        raise ValueError(f"block is a number of samples, expected at least 1, got {block}")
    for activation in activations:
        check_activation(activation, ACTIVATIONS)
    for index, weight in enumerate(weights):
        check_tensor(weight, f"weights[{index}]")
        if weight.dtype not in (torch.float32, torch.float64) or weight.device.type != "cpu":
            raise RuntimeError(
                f"expected weights in float32 or float64 on the CPU, got weights[{index}] in {weight.dtype} on "
                f"{weight.device}; use minibatches there"
            )
    check_network(weights, biases, activations)
    named = [(f"weights[{i}]", w) for i, w in enumerate(weights)]
    both = sharing(named + [(f"biases[{i}]", b) for i, b in enumerate(biases) if b is not None])
    if both is not None:
        raise ValueError(
            f"{both[0]} and {both[1]} are one tensor or lie in the same memory, where each would overwrite what the "
            "other has learned; train shared parameters with autograd"
        )
    check_tensor(images, "images")
    check_tensor(labels, "labels")
    if images.dim() != 2 or labels.shape != images.shape[:1]:
        raise RuntimeError(
            f"expected images [count, features] and labels [count], got {list(images.shape)} and {list(labels.shape)}"
        )
    check_input(images, weights[0], "weights[0]")
    if labels.is_floating_point():
        raise RuntimeError(f"expected integer labels, got {labels.dtype}")
    if order is not None:
        check_tensor(order, "order")
        if order.dim() != 1 or order.dtype != torch.int64:
            raise RuntimeError(f"expected order as int64 [steps], got {order.dtype} {list(order.shape)}")
        if order.numel():
            check_rows(order, len(labels))
        labels = labels[order]
    targets: list[int] = labels.tolist()
    if targets:
        check_classes(labels, weights[-1].shape[0], "expected labels from 0 to {last}, got {low} to {high}")
    return order, targets
