"""Differentiable fused operations as functions; ``fastmlp.nn`` has the same as modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import ops, reference
from .activations import ACTIVATIONS
from .autograd.elementwise import bce_loss, bce_with_logits, huber_loss, l1_loss, mse_loss, multiclass_nll
from .autograd.linear import LinearAct, MLPFunction
from .autograd.softmax import softmax, softmax_squared_error
from .autograd.transforms import transformed
from .backend import Runs, alone, functorch_active, get_backend, on_tape, runs
from .base.arguments import (
    check_activation,
    check_batch,
    check_input,
    check_layer,
    check_members,
    check_members_input,
    check_network,
    check_tensor,
)
from .base.compat import is_autocast_enabled
from .base.dropout import Dropout, checked_rates
from .base.signature import MOST, Signature, comparison, signature
from .cpu import get_cpu_gemm
from .losses import cross_entropy
from .ops import triton_ops
from .ops.dropout import dropped
from .ops.torch_losses import WIDE

__all__ = [
    "bce_loss",
    "bce_with_logits",
    "cross_entropy",
    "huber_loss",
    "l1_loss",
    "linear_act",
    "mlp",
    "mse_loss",
    "multiclass_nll",
    "softmax",
    "softmax_squared_error",
]

for _name in __all__:
    torch.fx.wrap(_name)  # a call is one node of a graph of torch.fx.symbolic_trace


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that torch.autocast asks matrix products on x's device to run in, or None outside autocast."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if is_autocast_enabled(device_type) else None


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Under autocast every floating-point operand but float64 takes the autocast dtype."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


#: Calls of the kernels that nobody watches and that passed all checks: the activations, and the tensors' signature.
_checked: set[tuple[object, ...]] = set()


class _Repeated(NamedTuple):
    """A call on a CPU that passed all checks, and that torch's own operations compute."""

    alike: Callable[..., bool]  #: compares tensors with those of the call: X, the weights, the biases that are not None
    absent: list[bool]  #: which biases are None; empty if every layer has one
    functions: list[Callable[[Tensor], Tensor] | None]  #: of the layers' Z; None: the identity


#: What ``reference.activate`` computes, bit by bit; the step function there is another one for NaN.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor] | None] = {name: f.new for name, f in ACTIVATIONS.items()}
_FUNCTIONS |= {"identity": None, "step": partial(reference.activate, activation="step")}
#: By the first weight, the shape of X, whether X is flattened, and the activations.
_repeated: dict[tuple[object, ...], _Repeated] = {}
#: Multiplications of a forward pass up to which torch's own operations on the tape are faster on a CPU than a node of
#: ours, which is Python. Larger products take longer than the Python, and fused they are up to 5 % faster.
_FEW = 1 << 27


def _alone(x: Tensor, *others: Tensor | None) -> Literal["triton", "torch"] | None:
    """``alone``, but None on a CPU where oneDNN was asked for, which torch's own operations do not call."""
    run = alone(x, *others)
    return None if run == "torch" and get_cpu_gemm() == "onednn" else run


def _torchs_own(backend: str, x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether torch's own operations compute the layers, on the tape; ``backend`` is what ``alone`` returned."""
    return (
        backend == "torch"
        and weights[0].dtype in WIDE
        and x.shape[:-1].numel() * sum([weight.numel() for weight in weights]) <= _FEW
    )


def _repeat(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str], flattens: bool
) -> Tensor | None:
    """A network of tensors like those of a call before, by torch's own operations; None if there was no such call.

    Its tensors are not checked again. The comparison also fails inside autocast, dispatch modes and transforms. A
    tracer, which it does not notice, sees torch's own operations. They are those of ``reference.mlp``, to the bit,
    written here once more because its functions of Python would cost a tenth of a small call.
    """
    if is_compiling() or get_backend() != "auto" or get_cpu_gemm() == "onednn" or forward_ad._current_level >= 0:
        return None
    try:
        found = _repeated.get((id(weights[0]), x.shape, flattens, *activations))
    except (TypeError, RuntimeError):  # an activation without a hash, a nested tensor without a shape: refused later
        return None
    if found is None:
        return None
    given = biases
    if found.absent:
        if [b is None for b in biases] != found.absent:
            return None
        given = [b for b in biases if b is not None]
    if not found.alike(x, *weights, *given):
        return None
    if flattens and x.dim() > 2:
        x = x.flatten(1)
    if x.dtype is torch.uint8:
        x = reference.pixels(x, weights[0].dtype)
    for weight, bias, f in zip(weights, biases, found.functions, strict=True):
        z = torch.nn.functional.linear(x, weight, bias)
        x = z if f is None else f(z)
    return x


def _remember(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str], flattens: bool
) -> None:
    """Let ``_repeat`` repeat a call that ``reference.mlp`` or ``reference.linear_act`` computes, x as it was given."""
    absent, given = [b is None for b in biases], [b for b in biases if b is not None]
    if any(t.layout != torch.strided for t in (x, *weights, *given)):
        return
    if len(_repeated) >= MOST:
        _repeated.clear()
    _repeated[(id(weights[0]), x.shape, flattens, *activations)] = _Repeated(
        comparison([x, *weights, *given]), absent if any(absent) else [], [_FUNCTIONS[name] for name in activations]
    )


def _needs_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


def linear_act(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    """A = f(x W^T + b): linear layer and activation in one kernel, gradients derived by hand.

    Args:
        x: [*, in_features], of weight's dtype, or uint8 pixels, which are scaled by 1/255 inside the kernel.
        weight: [out_features, in_features], as torch.nn.functional.linear's; any strides.
        bias: [out_features] or None.
        activation: a name of ``fastmlp.activations.LAYER_ACTIVATIONS``: "identity" (default), another elementwise one,
            or "softmax" over the features, which is a pass of its own after the kernel.

    Returns:
        [*, out_features] in weight's dtype (in the autocast dtype under torch.autocast).

    Differentiable with respect to x, weight and bias, twice with ``create_graph=True``. The kernels run on CUDA and
    HIP tensors in float32 (multiplied as ``torch.backends.cuda.matmul.fp32_precision`` says), float16 and bfloat16.
    Elsewhere plain torch runs: see ``fastmlp.set_backend``. Inside the transforms of torch.func (vmap, grad, jvp, ...),
    for inputs with tangents (``torch.autograd.forward_ad``) and in batched backward passes (``is_grads_batched=True``,
    ``vectorize=True``), the formula runs as plain torch operations, which can be transformed.

    torch.compile and torch.export take the call into one graph for all batch sizes. The graph has torch's own
    operations on plain torch, and operators of ``fastmlp.library`` where the kernels run. A compiled call has first
    derivatives only. Subclasses of Tensor with operations of their own, such as DTensor and quantized weights, run on
    plain torch on every backend.

    torch.jit and torch.fx are not supported beyond this. torch.jit.trace records plain torch operations, and warns of
    our checks of shapes. torch.jit.script compiles what ``MLP.to_torch`` returns, but no single layer or loss.
    torch.fx.symbolic_trace takes a call as one node. Use torch.export, or trace ``MLP.to_torch()``.

    Raises:
        ValueError: unknown activation.
        TypeError: arguments that are not tensors.
        RuntimeError: shapes, dtypes or devices that do not fit, as torch.nn.functional.linear. Forward-mode derivatives
            on backend "triton" or under torch.inference_mode.
    """
    if x.__class__ is Tensor and x.is_cpu:
        a = _repeat(x, (weight,), (bias,), (activation,), False)
        if a is not None:
            return a
    check_activation(activation)
    if activation == "softmax":
        return softmax(linear_act(x, weight, bias))
    check_tensor(x, "the input")
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = _cast(x, dtype), _cast(weight, dtype), _cast(bias, dtype)  # type: ignore[assignment]
    check_layer(weight, bias)
    check_input(x, weight)
    backend = runs(weight.dtype, x, weight, bias)
    if _torchs_own(backend, x, (weight,)) and _alone(x, weight, bias) == "torch":
        _remember(x, (weight,), (bias,), (activation,), False)
        return reference.linear_act(x, weight, bias, activation)
    if backend == "formula" or transformed(x, weight, bias):
        return reference.linear_act(x, weight, bias, activation)
    # One row per sample. reshape(-1, K) cannot infer the number of rows when K is 0.
    x2d = x if x.dim() == 2 else x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)
    if torch.is_grad_enabled() and (_needs_grad(x) or _needs_grad(weight) or _needs_grad(bias)) and on_tape(backend):
        a, _ = LinearAct.apply(x2d, weight, bias, activation, backend)
    else:
        a, _ = ops.on(backend).linear_fwd(x2d, weight, bias, activation)
    return a if x.dim() == 2 else a.view(*x.shape[:-1], weight.shape[0])


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str],
    members: int | None = None,
    dropout: float | Sequence[float] | Drops | None = None,
    dropout_state: Tensor | None = None,
) -> Tensor:
    """A whole multilayer perceptron as one node of the tape: A_l = f_l(A_{l-1} W_l^T + b_l), A_0 = x.

    Args:
        x: [B, in_features] of the weights' dtype, or uint8 pixels, or [B, ...], flattened from dimension 1.
        weights: L tensors [n_l, n_{l-1}].
        biases: L tensors [n_l], or None for a layer without one.
        activations: L names as in ``linear_act``; the last one is usually "identity" (logits). A new node of the tape
            begins after a softmax.
        members: None for one network, or the number E of networks of one shape, whose weights are [E, n_l, n_{l-1}] and
            biases [E, n_l]. Then x is [B, in_features], the same for all members, or [E, B, in_features].
        dropout: the probability p of an element of a hidden layer's output to be dropped, or one for each hidden layer:
            A_l becomes keep * A_l / (1 - p). Default None, no dropout.
        dropout_state: int64 [2] on x's device, the seed and the number of the pass, from which the masks are computed
            (``fastmlp.reference.keep_mask``). The call adds 1 to the number of the pass, in place. Needed with dropout.

    Returns:
        A_L [B, n_L], or [E, B, n_L].

    Gradients, backends and errors as ``linear_act``. In the backward pass the derivative of each layer's activation is
    part of the matrix product above the layer. Layers below the lowest one that needs a gradient cost nothing.

    Raises:
        ValueError: no layers, or not as many weights as biases and activations; a probability below 0, or 1 and above.
        RuntimeError: dropout inside a transform of torch.func, or when a backward pass computes the forward pass again.
    """
    known = run = None
    given = x
    is_plain = members is None and dropout is None and weights and len(weights) == len(biases)
    if is_plain and x.__class__ is Tensor and x.is_cpu:
        a = _repeat(x, weights, biases, activations, True)
        if a is not None:
            return a
    for activation in activations:
        check_activation(activation)
    if is_plain:
        tensors: tuple[Any, ...] = (x, *chain.from_iterable(zip(weights, biases, strict=True)))
        run = _alone(*tensors)
        if run == "triton":
            known = signature(tensors, weights[0])
            if (*activations, known) in _checked:
                if x.dim() > 2:
                    x, known = x.flatten(1), None
                return _on_tape(x, tensors[1:], tuple(activations), "triton", known)
    check_tensor(x, "the input")
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x = _cast(x, dtype)  # type: ignore[assignment]
        weights = [_cast(w, dtype) for w in weights]  # type: ignore[misc]
        biases = [_cast(b, dtype) for b in biases]
    if members is None:
        check_network(weights, biases, activations)
        check_batch(x, weights[0].shape[1])
        x = x.flatten(1) if x.dim() > 2 else x
        check_input(x, weights[0], "weights[0]")
    else:
        check_members(weights, biases, activations, members)
        check_members_input(x, weights[0])
    drops = None if dropout is None else begin_dropout(dropout, dropout_state, len(weights) - 1, x)
    if "softmax" in activations:
        end = list(activations).index("softmax") + 1
        first = None if drops is None else Drops((*drops[: end - 1], None))
        a = softmax(mlp(x, weights[:end], biases[:end], [*activations[: end - 1], "identity"], members, first))
        if drops is not None and (own := drops[end - 1]) is not None:
            a = dropped(a, own)
        rest = None if drops is None else Drops(drops[end:])
        return a if end == len(weights) else mlp(a, weights[end:], biases[end:], activations[end:], members, rest)
    backend = runs(weights[0].dtype, x, *weights, *biases)
    if backend == "formula" or transformed(x, *weights, *biases):
        if drops is None:
            return reference.mlp(x, weights, biases, activations)
        places = drops
        return reference.mlp(
            x, weights, biases, activations, lambda a, i: a if (own := places[i]) is None else dropped(a, own)
        )
    if members is not None:
        backend = "members" if backend == "torch" else backend
        if x.requires_grad and x.dim() == 2:
            x = x.expand(members, -1, -1)  # whose derivative is the sum over the members
    elif known is not None and backend == "triton":
        if len(_checked) >= MOST:
            _checked.clear()
        _checked.add((*activations, known))
    elif run == "torch" and _torchs_own(backend, x, weights):
        _remember(given, weights, biases, activations, True)
        return reference.mlp(x, weights, biases, activations)
    params = [p for pair in zip(weights, biases, strict=True) for p in pair]
    return _on_tape(x, params, tuple(activations), backend, drops=drops)


class Drops(tuple[Dropout | None, ...]):
    """The dropout of each layer's output in one pass, or None for a layer without; the last layer never has any."""


def begin_dropout(dropout: object, state: Tensor | None, hidden: int, x: Tensor) -> Drops | None:
    """What one pass drops, with the state as it was; the state goes on to the next pass. None if nothing is dropped.

    The state is copied, because the backward pass needs the numbers of its forward pass.
    """
    if isinstance(dropout, Drops):
        return dropout if any(dropout) else None
    rates = checked_rates(dropout, hidden)
    rates = (rates,) * hidden if isinstance(rates, float) else rates
    if not any(rates):
        return None
    if state is None:
        raise ValueError(
            "dropout needs a dropout_state, int64 [2] with a seed and 0; such as torch.tensor([seed, 0], device=...)"
        )
    check_tensor(state, "dropout_state")
    if state.dtype != torch.int64 or state.shape != (2,) or state.device != x.device:
        raise RuntimeError(
            f"expected dropout_state to be int64 [2] on {x.device}, got {state.dtype} {list(state.shape)} on "
            f"{state.device}"
        )
    if functorch_active():
        raise RuntimeError(
            "dropout counts its passes in place, which a transform of torch.func (vmap, grad, jvp, ...) cannot do; "
            "call model.eval() before the transform, or use autograd"
        )
    if not is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a forward pass with dropout runs inside a backward pass, as torch.utils.checkpoint does to compute it "
            "again; its masks would be those of another pass. Leave the checkpoint out, or set model.dropout = 0"
        )
    now = state.clone()
    state.select(0, 1).add_(1)
    return Drops((*(Dropout(now, layer, p) if p else None for layer, p in enumerate(rates)), None))


def _on_tape(
    x: Tensor,
    params: Sequence[Tensor | None],
    activations: tuple[str, ...],
    backend: Runs,
    known: Signature | None = None,
    drops: Drops | None = None,
) -> Tensor:
    """``mlp`` of what was checked, with W_1, b_1, W_2, ... and the signature of all tensors if it is known."""
    # Layers below the lowest one that needs a gradient run off the tape and leave nothing behind.
    first, count = 0, len(activations)
    if not (torch.is_grad_enabled() and on_tape(backend)):
        first = count
    elif not x.requires_grad:
        while first < count and not (_needs_grad(params[2 * first]) or _needs_grad(params[2 * first + 1])):
            first += 1
    if first == count and drops is None and backend == "triton" and triton_ops.are_grouped(x):
        together = triton_ops.network_fwd(x, params, activations, (False,) * count, known)
        if together is not None:
            return together[-1]
    if first:
        for i, (w, b, activation) in enumerate(zip(params[0 : 2 * first : 2], params[1::2], activations, strict=False)):
            assert w is not None
            if drops is None:
                x, _ = ops.on(backend).linear_fwd(x, w, b, activation)
            else:
                x, _ = ops.on(backend).linear_fwd(x, w, b, activation, dropout=drops[i])
        if first == count:
            return x
        params, activations, known = params[2 * first :], activations[first:], None
        drops = None if drops is None else Drops(drops[first:])
    if drops is None or not any(drops):
        a, *_ = MLPFunction.apply(x, (activations, backend, known, None), *params)
        return a
    state = next(own.state for own in drops if own is not None)
    places = tuple(None if own is None else own._replace(state=None) for own in drops)  # type: ignore[arg-type]
    a, *_ = MLPFunction.apply(x, (activations, backend, None, places), *params, state)
    return a
