"""JAX's jit for the single operations; gradients by its own differentiation, compiled with the forward pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.problems import Problem, Results
from bench.rivals.formulas import RESULTS
from bench.rivals.jax_step import activation, import_jax
from bench.rivals.protocol import Availability, Run, installed, needs

__all__ = ["JaxOperation"]


class _JaxOpRun:
    def __init__(self, problem: Problem) -> None:
        self.jax = jax = import_jax()
        jnp = jax.numpy
        self.names = RESULTS[problem.kind]
        self.count = 0
        self.last: Any = None
        dtype = jnp.dtype(problem.dtype)
        precision = jax.lax.Precision.HIGHEST if problem.dtype == "float32" else None
        name = getattr(problem, "activation", "identity")
        f = (lambda z: z) if name == "identity" else activation(jax, name)

        def linear(x: Any, w: Any, b: Any) -> Any:
            return f(jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=precision) + b)

        def mean_loss(z: Any, y: Any) -> Any:
            return -jnp.take_along_axis(jax.nn.log_softmax(z.astype(jnp.float32)), y[:, None], 1).mean()

        def head(h: Any, w: Any, b: Any, y: Any) -> Any:
            z, back = jax.vjp(lambda h: linear(h, w, b), h)
            loss, dz = jax.value_and_grad(mean_loss)(z, y)
            return loss, dz, back(dz)[0]

        functions = {
            "linear_act": lambda x, w, b, da: (linear(x, w, b),),
            "wgrad": lambda x, w, b, dz: (jnp.matmul(dz.T, x, precision=precision), dz.sum(0)),
            "cross_entropy": jax.value_and_grad(mean_loss),
            "head": head,
        }
        self.function = jax.jit(functions[problem.kind])

        def array(t: torch.Tensor) -> Any:
            return jnp.array(t.numpy()).astype(dtype if t.is_floating_point() else jnp.int32)

        self.sets = [tuple(array(t) for t in problem.make_inputs(i)) for i in range(problem.input_sets)]

    def __call__(self) -> object:
        self.last = self.function(*self.sets[self.count % len(self.sets)])
        self.count += 1
        return self.last

    def finish(self) -> None:
        """Wait for the dispatched calls."""
        self.jax.block_until_ready(self.last)

    def results(self) -> Results:
        """The arrays of the last call."""
        arrays = zip(self.names, self.last, strict=True)
        return {name: torch.from_numpy(np.array(value.astype("float32"))).double() for name, value in arrays}


class JaxOperation:
    """One jit per operation."""

    name = "jax"
    label = "JAX jit"
    kinds = frozenset(RESULTS)
    notes = "jax.jit; forward and gradient compiled together"

    def available(self, problem: Problem) -> Availability:
        here = installed("jax")
        if not here.ok:
            return here
        platform = import_jax().default_backend()
        return needs(
            ((platform == "gpu") == problem.device.startswith("cuda"), f"this JAX computes on the {platform}"),
            (problem.timing == "chain", "computes on streams of its own, where torch's events see nothing"),
            (problem.kind != "linear_act_backward", "cannot compile a backward pass apart from its forward pass"),
        )

    def build(self, problem: Problem) -> Run:
        return _JaxOpRun(problem)
