"""JAX: the whole step in one jit with donated parameters; many steps are a scan over samples or batches in one jit."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from bench.problems import OPTIMIZERS, Problem, Results
from bench.problems.training import ADAM_BETA_2, ADAMS
from bench.rivals.protocol import Availability, Run, installed, needs
from bench.rivals.training import TrainingProblem

__all__ = ["JaxStep", "as_array", "computes_there", "import_jax", "loss_function"]


def import_jax() -> Any:
    """The jax module, told not to take most of a GPU's memory at once."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    return jax


def activation(jax: Any, name: str) -> Any:
    """jax.nn's function of that name; gelu is the exact one."""
    if name == "gelu":
        return lambda z: jax.nn.gelu(z, approximate=False)
    return jax.numpy.tanh if name == "tanh" else getattr(jax.nn, name)


def loss_function(jax: Any, problem: TrainingProblem) -> Any:
    """A function of (parameters, X, Y) that returns the mean loss of one network; with dropout it takes a key too."""
    jnp = jax.numpy
    f = activation(jax, problem.activation)
    compute = jnp.dtype(problem.dtype)
    precision = jax.lax.Precision.HIGHEST if problem.dtype == "float32" else None
    kept, class_weight = 1 - problem.dropout, problem.class_weight()
    weight = None if class_weight is None else jnp.array(class_weight.numpy())

    def loss_of(params: Any, x: Any, y: Any, key: Any = None) -> Any:
        a = x.astype(compute)
        for i in range(0, len(params), 2):
            w, b = params[i].astype(compute), params[i + 1].astype(compute)
            a = jax.lax.dot_general(a, w, (((1,), (1,)), ((), ())), precision=precision) + b
            if i < len(params) - 2:
                a = f(a)
                if kept < 1:
                    keep = jax.random.bernoulli(jax.random.fold_in(key, i), kept, a.shape)
                    a = jnp.where(keep, a / kept, 0)
        a = a.astype(jnp.float32)
        if problem.loss == "mse":
            return ((a - y) ** 2).mean()
        log_p = jnp.take_along_axis(jax.nn.log_softmax(a), y[:, None], 1)[:, 0]
        return -log_p.mean() if weight is None else -(weight[y] * log_p).sum() / weight[y].sum()

    return loss_of


def as_array(jax: Any, t: torch.Tensor) -> Any:
    """The same values as JAX's array; int64 as int32."""
    return jax.numpy.array((t if t.is_floating_point() else t.int()).numpy())


def computes_there(problem: Problem) -> Availability:
    """Whether JAX is installed and computes on the problem's device."""
    here = installed("jax")
    if not here.ok:
        return here
    platform = import_jax().default_backend()
    return needs(((platform == "gpu") == problem.device.startswith("cuda"), f"this JAX computes on the {platform}"))


class _JaxRun:
    def __init__(self, problem: TrainingProblem) -> None:
        self.jax = jax = import_jax()
        jnp = jax.numpy
        self.params = [jnp.array(p.numpy()) for p in problem.parameters()]
        #: Tensors like the parameters: none, the velocities, or both moments; and the number of updates of AdamW.
        self.velocity: Any = []
        if problem.optimizer != "sgd":
            self.velocity = [jnp.zeros_like(p) for p in self.params]
        if problem.optimizer in ADAMS:
            self.velocity = (self.velocity, [jnp.zeros_like(p) for p in self.params], jnp.zeros(()))

        self.sets = [tuple(as_array(jax, t) for t in problem.make_inputs(i)) for i in range(problem.input_sets)]
        self.count = 0
        settings = OPTIMIZERS[problem.optimizer]
        lr, momentum = settings["lr"], settings.get("momentum", 0.0)
        loss_of = loss_function(jax, problem)

        def adamw(params: Any, state: Any, grads: Any) -> Any:
            (first, second, count), (beta1, beta2, eps) = state, (0.9, ADAM_BETA_2, 1e-8)
            count = count + 1
            first = [m + (1 - beta1) * (g - m) for m, g in zip(first, grads, strict=True)]
            second = [v + (1 - beta2) * (g * g - v) for v, g in zip(second, grads, strict=True)]
            rate, root = lr / (1 - beta1**count), jnp.sqrt(1 - beta2**count)
            moved = [
                p * (1 - lr * settings.get("weight_decay", 0.0)) - rate * m / (jnp.sqrt(v) / root + eps)
                for p, m, v in zip(params, first, second, strict=True)
            ]
            return moved, (first, second, count)

        def step(params: Any, velocity: Any, x: Any, y: Any) -> Any:
            rest: tuple[Any, ...] = ()
            if problem.dropout:  # a new mask for each update, by the number of updates
                rest = (jax.random.fold_in(jax.random.key(0), velocity[2].astype("int32")),)
            loss, grads = jax.value_and_grad(loss_of)(params, x, y, *rest)
            if isinstance(velocity, tuple):
                return *adamw(params, velocity, grads), loss
            if not velocity:
                return [p - lr * g for p, g in zip(params, grads, strict=True)], velocity, loss
            velocity = [momentum * v + g for v, g in zip(velocity, grads, strict=True)]
            moved = zip(params, velocity, grads, strict=True)
            return [p - lr * (g + momentum * v) for p, v, g in moved], velocity, loss

        def samples(params: Any, velocity: Any, x: Any, y: Any) -> Any:
            def one(carry: Any, sample: Any) -> Any:
                params, velocity, loss = step(carry[0], carry[1], sample[0][None], sample[1][None])
                return (params, velocity), loss

            (params, velocity), losses = jax.lax.scan(one, (params, velocity), (x, y))
            return params, velocity, losses.mean()

        def batches(params: Any, velocity: Any, x: Any, y: Any, order: Any) -> Any:
            def one(carry: Any, rows: Any) -> Any:
                params, velocity, loss = step(carry[0], carry[1], x[rows], y[rows])
                return (params, velocity), loss

            rows = order.reshape(-1, problem.batch)
            (params, velocity), losses = jax.lax.scan(one, (params, velocity), rows)
            return params, velocity, losses.mean()

        calls = {"step": step, "online": samples, "epoch": batches}
        self.step = jax.jit(calls[problem.kind], donate_argnums=(0, 1))
        self.loss: Any = None

    def __call__(self) -> object:
        inputs = self.sets[self.count % len(self.sets)]
        self.count += 1
        self.params, self.velocity, self.loss = self.step(self.params, self.velocity, *inputs)
        return self.loss

    def finish(self) -> None:
        """Wait for the dispatched steps."""
        self.jax.block_until_ready((self.params, self.loss))

    def results(self) -> Results:
        """The parameters."""
        return {f"parameter {i}": torch.from_numpy(np.array(p)).double() for i, p in enumerate(self.params)}


class JaxStep:
    """jit with donated buffers: XLA sees the whole step."""

    name = "jax"
    label = "JAX jit"
    kinds = frozenset({"step", "online", "epoch"})
    notes = "value_and_grad and update in one jit, parameters donated, XLA's own threads; online and epoch: lax.scan"

    def available(self, problem: Problem) -> Availability:
        return needs(
            computes_there(problem),
            (getattr(problem, "bias", True), "written with biases"),
            (problem.dtype in ("float32", "bfloat16"), "written without a loss scale"),
            (not getattr(problem, "dropout", 0) or getattr(problem, "optimizer", "") in ADAMS, "drops with Adam only"),
        )

    def build(self, problem: Problem) -> Run:
        return _JaxRun(problem)  # type: ignore[arg-type]
