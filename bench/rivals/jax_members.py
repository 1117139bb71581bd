"""JAX: one network's whole step, vmapped over members in one jit with donated parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.problems import OPTIMIZERS, MembersProblem, Problem, Results
from bench.problems.training import ADAM_BETA_2
from bench.rivals.jax_step import as_array, computes_there, import_jax, loss_function
from bench.rivals.protocol import Availability, Run, needs

__all__ = ["JaxMembers"]

#: torch.optim's defaults.
_BETA_1, _EPS = 0.9, 1e-8


class _JaxMembersRun:
    def __init__(self, problem: MembersProblem) -> None:
        self.jax = jax = import_jax()
        self.problem = problem
        jnp = jax.numpy
        params = [as_array(jax, p) for p in problem.parameters()]
        zeros = [jnp.zeros_like(p) for p in params]
        settings = OPTIMIZERS[problem.optimizer]
        lr, decay = settings["lr"], settings.get("weight_decay", 0.0)
        loss_of = loss_function(jax, problem)

        def sgd(params: Any, x: Any, y: Any) -> Any:
            loss, grads = jax.value_and_grad(loss_of)(params, x, y)
            return [p - lr * g for p, g in zip(params, grads, strict=True)], loss

        def adamw(params: Any, first: Any, second: Any, count: Any, x: Any, y: Any) -> Any:
            loss, grads = jax.value_and_grad(loss_of)(params, x, y)
            count = count + 1
            first = [_BETA_1 * m + (1 - _BETA_1) * g for m, g in zip(first, grads, strict=True)]
            second = [ADAM_BETA_2 * v + (1 - ADAM_BETA_2) * g * g for v, g in zip(second, grads, strict=True)]
            rate, correction = lr / (1 - _BETA_1**count), jnp.sqrt(1 - ADAM_BETA_2**count)
            moved = zip(params, first, second, strict=True)
            params = [p * (1 - lr * decay) - rate * m / (jnp.sqrt(v) / correction + _EPS) for p, m, v in moved]
            return params, first, second, count, loss

        self.state: tuple[Any, ...] = (params,)
        one: Any = sgd
        if problem.optimizer == "adamw":
            self.state = params, zeros, [jnp.copy(z) for z in zeros], jnp.zeros(problem.members)
            one = adamw
        self.step = jax.jit(jax.vmap(one), donate_argnums=tuple(range(len(self.state))))
        self.sets = [tuple(as_array(jax, t) for t in problem.make_inputs(i)) for i in range(problem.input_sets)]
        self.count = 0
        self.losses: Any = None

    def __call__(self) -> object:
        inputs = self.sets[self.count % len(self.sets)]
        self.count += 1
        *state, self.losses = self.step(*self.state, *inputs)
        self.state = tuple(state)
        return self.losses

    def finish(self) -> None:
        """Wait for the dispatched steps."""
        self.jax.block_until_ready((self.state, self.losses))

    def results(self) -> Results:
        """The parameters of the members that the gate compares."""
        params = [self.problem.compared(torch.from_numpy(np.array(p))) for p in self.state[0]]
        return {f"parameter {i}": p.double() for i, p in enumerate(params)}


class JaxMembers:
    """How people who use JAX train many networks."""

    name = "jax"
    label = "JAX vmap, jit"
    kinds = frozenset({"members"})
    notes = "vmap of value_and_grad and update in one jit, parameters and states donated; AdamW written by hand"

    def available(self, problem: Problem) -> Availability:
        return needs(
            computes_there(problem),
            (getattr(problem, "bias", True), "written with biases"),
            (problem.dtype in ("float32", "bfloat16"), "written without a loss scale"),
            (getattr(problem, "optimizer", "") in ("sgd", "adamw"), "written for plain SGD and AdamW"),
        )

    def build(self, problem: Problem) -> Run:
        return _JaxMembersRun(problem)  # type: ignore[arg-type]
