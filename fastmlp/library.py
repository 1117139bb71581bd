"""The kernels as operators of torch, ``torch.ops.fastmlp.*``, which exist once ``fastmlp`` or this module is imported.

torch.compile and torch.export put the operators into their graphs where the kernels run. A program that was exported
and saved needs one import in the process that loads it:

    import fastmlp.library
    program = torch.export.load("mlp.pt2")

The operators, with M batch, K inputs, N outputs and C classes:

    linear_fwd(x, weight, bias, activation, save_z) -> (A, Z)       A = f(X W^T + b); Z is empty without ``save_z``
    linear_dgrad(dz, weight, saved, activation) -> dX               (dZ W) * f' of the layer below
    linear_wgrad(dz, x, bias) -> (dW, db)                           db is empty without ``bias``
    activation_bwd(da, saved, activation) -> dZ                     dA * f'
    cross_entropy_fwd(z, target, weight, reduction, ignore_index, smoothing, dtype) -> (loss, statistics, denominator)
    cross_entropy_bwd(dloss, z, target, weight, statistics, denominator, ignore_index, smoothing, want_dz, want_dt)
        -> (dZ, dTarget)
    loss_fwd(a, y, loss, reduction, delta=1.0) -> loss              a loss of ``fastmlp.base.losses``
    loss_bwd(g, a, y, loss, reduction, want_da, want_dy, delta=1.0) -> (dA, dY)
    dropout_keep(state, layer, rows, columns, p, stream=0) -> bool [rows, columns]    which elements dropout keeps

The first four also take the members of an ensemble, as one dimension more in front of W, b, dZ, dA and ``saved``; X is
[E, M, K], or [M, K] for all members.

``saved`` is what f' is computed from: A for "sigmoid", "relu", "tanh" and "leaky_relu", Z for "gelu" and "silu", else
None. Every operator has an autograd formula and knows the shapes of its results. Shapes, dtypes and devices that do not
fit raise RuntimeError (ValueError for names), also while a program is traced. Nothing that an operator returns shares
memory with its arguments. The operators need tensors on a GPU, or Triton's interpreter; dropout_keep needs neither.
"""

from .ops import compiled, compiled_losses, dropout

__all__ = ["OPERATORS"]

#: The operators by name.
OPERATORS = {
    name.removesuffix("_operator"): operator
    for module in (compiled, compiled_losses, dropout)
    for name, operator in vars(module).items()
    if name.endswith("_operator")
}
