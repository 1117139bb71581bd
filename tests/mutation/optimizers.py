"""Bugs planted in the optimizers' update, each with the tests that find it."""

from __future__ import annotations

from tests.mutation.harness import Mutant

__all__ = ["MUTANTS"]

UPDATE = "tests/kernels/test_wgrad_update.py"


def _of(rule: str, bug: str, old: str, new: str) -> Mutant:
    return Mutant("optimizer", f"{rule}: {bug}", old, new, (UPDATE, f"every_optimizer and direct and {rule}"))


WHOLE = "tests/whole/test_step.py"

MUTANTS = (
    Mutant(
        "optimizer",
        "the average forgets at once",
        "average += (w - average) * tl.load(hyper_ptr + EMA_WEIGHT)",
        "average = w",
        (WHOLE, "averages and sgd"),
    ),
    Mutant(
        "optimizer",
        "the average in the momentum's place",
        "average_ptr = states[len(states) - 1]",
        "average_ptr = states[0]",
        (WHOLE, "averages and momentum"),
    ),
    Mutant(
        "optimizer",
        "warm-up forgotten",
        "weight = tl.maximum(weight.to(tl.float32), tl.load(hyper_ptr + i * COLUMNS + EMA_WEIGHT))",
        "weight = tl.load(hyper_ptr + i * COLUMNS + EMA_WEIGHT)",
        (WHOLE, "averages and adamw and warm"),
    ),
    Mutant(
        "wgrad_update",
        "group of the first",
        "        hyper_ptr += layer.w_settings\n",
        "        hyper_ptr += 0\n",
        (WHOLE, "optimizers and groups and not float16"),
    ),
    Mutant(
        "wgrad_update",
        "group of the first",
        "        hyper_ptr += layer.b_settings\n",
        "        hyper_ptr += 0\n",
        (WHOLE, "optimizers and groups and not float16"),
    ),
    Mutant(
        "reduce_update",
        "group of the first",
        "            hyper_ptr += parameter.settings\n",
        "            hyper_ptr += 0\n",
        (WHOLE, "optimizers and groups and float16"),
    ),
    Mutant(
        "optimizer",
        "the first group's rate for all",
        "rate = tl.load(hyper_ptr + i * COLUMNS + 1)",
        "rate = tl.load(hyper_ptr + 1)",
        (WHOLE, "optimizers and groups and float16"),
    ),
    _of(
        "adam",
        "weight decay dropped",
        "            g = tl.fma(w, tl.load(hyper_ptr), g)\n",
        "            g = g + 0.0\n",
    ),
    _of(
        "amsgrad",
        "the last moment in place of the largest",
        "v = tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL)",
        "v = tl.where(largest < 0, largest, v)",
    ),
    _of("amsgrad", "down the gradient with maximize", "        g = -g\n", "        g = g + 0.0\n"),
    _of("rmsprop", "weight decay dropped", "    g = tl.fma(w, tl.load(hyper_ptr + 1), g)\n    weight", "    weight"),
    _of("rmsprop", "eps dropped", "change = g / (tl.sqrt(v) + tl.load(hyper_ptr + 4))", "change = g / tl.sqrt(v + 1)"),
    _of("centered", "not centered", "        v -= n * n\n", "        v -= 0.0 * n\n"),
    _of(
        "rmsprop",
        "momentum not kept",
        "        tl.store(m_ptr + offs, change, mask=mask)\n",
        "        tl.store(m_ptr + offs, m, mask=mask)\n",
    ),
    _of(
        "rmsprop",
        "momentum forgotten",
        "        change += tl.load(hyper_ptr + 5) * m\n",
        "        change += 0.0 * m\n",
    ),
    _of("lion", "weight decay dropped", "* tl.fma(w, tl.load(hyper_ptr + 1), sign)", "* sign"),
    _of(
        "lion",
        "the momentum's beta for the direction",
        "direction = m + change * tl.load(hyper_ptr + 2)",
        "direction = m + change * tl.load(hyper_ptr + 3)",
    ),
    _of("lion", "direction of the gradient", "direction = m + change", "direction = g + 0.0 * change"),
)
