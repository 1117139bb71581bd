"""fastmlp's functions and modules on the samples with which PyTorch tests its own: OpInfo and ModuleInfo.

Values, gradients and exceptions are those of torch's twin, in float32, float64 and bfloat16.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmlp
from fastmlp import functional
from tests.support.harness import assert_within_budget
from tests.support.torch_samples import DTYPES, Sample
from tests.test_layout import ROOT


def layer(activation: str) -> Callable[..., Tensor]:
    """An activation by ``linear_act``, with the unit matrix as the weight."""

    def activate(z: Tensor) -> Tensor:
        return functional.linear_act(z, torch.eye(z.shape[-1], dtype=z.dtype), None, activation)

    return activate


def softmax(z: Tensor, dim: int) -> Tensor:
    """Over the last dimension, the only one that fastmlp has."""
    return functional.softmax(z.transpose(dim, -1)).transpose(dim, -1)


#: fastmlp's function or module, and torch's, by the name that torch's samples have.
TWINS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "nn.functional.linear": (functional.linear_act, F.linear),
    "nn.functional.cross_entropy": (functional.cross_entropy, F.cross_entropy),
    "nn.functional.mse_loss": (functional.mse_loss, F.mse_loss),
    "nn.functional.l1_loss": (functional.l1_loss, F.l1_loss),
    "nn.functional.binary_cross_entropy": (functional.bce_loss, F.binary_cross_entropy),
    "nn.functional.binary_cross_entropy_with_logits": (
        functional.bce_with_logits,
        F.binary_cross_entropy_with_logits,
    ),
    "softmax": (softmax, torch.softmax),
    "sigmoid": (layer("sigmoid"), torch.sigmoid),
    "tanh": (layer("tanh"), torch.tanh),
    "nn.functional.relu": (layer("relu"), F.relu),
    "nn.functional.leaky_relu": (layer("leaky_relu"), F.leaky_relu),
    "nn.functional.gelu": (layer("gelu"), F.gelu),
    "nn.functional.silu": (layer("silu"), F.silu),
    "nn.Linear": (fastmlp.Linear, nn.Linear),
    "nn.functional.huber_loss": (functional.huber_loss, F.huber_loss),
    "nn.CrossEntropyLoss": (fastmlp.CrossEntropyLoss, nn.CrossEntropyLoss),
    "nn.MSELoss": (fastmlp.MSELoss, nn.MSELoss),
    "nn.L1Loss": (fastmlp.L1Loss, nn.L1Loss),
    "nn.HuberLoss": (fastmlp.HuberLoss, nn.HuberLoss),
    "nn.BCEWithLogitsLoss": (fastmlp.BCEWithLogitsLoss, nn.BCEWithLogitsLoss),
}


class Refused(NamedTuple):
    """Samples that torch takes and fastmlp does not."""

    why: str
    applies: Callable[[str, Sample], bool]
    raises: type[Exception] | tuple[type[Exception], ...]


def _is_activation(name: str) -> bool:
    return name in TWINS and TWINS[name][0].__name__ == "activate"


REFUSED = (
    Refused("an activation has no settings", lambda name, s: _is_activation(name) and bool(s.kwargs), TypeError),
    Refused(
        "a layer has a dimension of features", lambda name, s: _is_activation(name) and not s.args[0].dim(), IndexError
    ),
    Refused(
        "softmax has a dimension of classes",
        lambda name, s: name == "softmax" and not s.args[0].dim(),
        (RuntimeError, IndexError),
    ),
    Refused(
        "the loss of probabilities has no weights",
        lambda name, s: name == "nn.functional.binary_cross_entropy" and "weight" in s.kwargs,
        TypeError,
    ),
)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, torch.dtype], list[Sample]]:
    """torch's samples by the name in ``TWINS`` and the dtype."""
    if importlib.util.find_spec("expecttest") is None:
        pytest.skip("torch's samples need the package expecttest, which is one of the extra 'dev'")
    path = tmp_path_factory.mktemp("samples") / "samples.pt"
    command = [sys.executable, "-m", "tests.support.torch_samples", str(path), *TWINS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "ImportError" in done.stderr or "ModuleNotFoundError" in done.stderr:
        pytest.skip(f"this torch has its samples elsewhere: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=False)


def fresh(value: Any, dtype: torch.dtype) -> Any:
    """Tensors as leaves of their own, floating-point ones in ``dtype``; other values as they are."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone().requires_grad_(value.requires_grad)
    return value if not value.is_floating_point() else value.detach().to(dtype).requires_grad_(value.requires_grad)


def results(
    function: Callable[..., Any], sample: Sample, dtype: torch.dtype, computed: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The value and the gradients of every tensor that requires one; values of ``dtype`` are computed in another."""
    computed = computed or dtype
    args = [fresh(a, computed) for a in sample.args]
    kwargs = {name: fresh(a, computed) for name, a in sample.kwargs.items()}
    named = [*((f"argument {n}", a) for n, a in enumerate(args)), *kwargs.items()]
    at = {name: a for name, a in named if isinstance(a, Tensor) and a.requires_grad}
    if sample.build is not None:
        torch.manual_seed(0)
        positional, options = sample.build
        function = function(*positional, **options).to(dtype).to(computed)
        at.update(function.named_parameters())
    out = function(*args, **kwargs)
    upstream = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype).to(out.dtype)
    grads = torch.autograd.grad(out, list(at.values()), upstream, allow_unused=True) if at else ()
    found = {"value": out.detach(), **dict(zip(at, grads, strict=True))}
    return {name: t for name, t in found.items() if t is not None}


def outcome(function: Callable[..., Any], *how: Any) -> dict[str, Tensor] | Exception:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of shapes that torch is about to broadcast
        try:
            return results(function, *how)
        except Exception as error:
            return error


def short(value: Any) -> str:
    """A sample with the shapes of its tensors."""
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, dict):
        return ", ".join(f"{name}={short(v)}" for name, v in value.items())
    return f"({', '.join(map(short, value))})" if isinstance(value, tuple) else repr(value)


def difference(name: str, sample: Sample, dtype: torch.dtype) -> str | None:
    """What is not as in torch; None where all is."""
    ours, theirs = TWINS[name]
    want, got = outcome(theirs, sample, dtype), outcome(ours, sample, dtype)
    assert not sample.wrong or isinstance(want, Exception), "torch takes what its own tests call wrong"
    refused = next((r for r in REFUSED if r.applies(name, sample)), None)
    if refused is not None:
        return None if isinstance(got, refused.raises) else f"no longer refused ({refused.why}): {got!r}"
    if isinstance(want, Exception):
        return None if isinstance(got, type(want)) else f"torch raises {want!r}, fastmlp gives {got!r}"
    if isinstance(got, Exception):
        return f"fastmlp raises {got!r}"
    if got.keys() != want.keys():
        return f"expected {list(want)}, got {list(got)}"
    exact = results(theirs, sample, dtype, torch.float64) if dtype == torch.bfloat16 else want
    for what, expected in want.items():
        try:
            if dtype != torch.bfloat16:
                torch.testing.assert_close(got[what], expected, equal_nan=True)
                continue
            # torch rounds to 16 bits between its operations, fastmlp once, so that float64 must judge.
            assert got[what].dtype == expected.dtype
            assert torch.equal(got[what].isnan(), expected.isnan())
            judged = (t.nan_to_num() for t in (got[what], exact[what], expected))
            assert_within_budget(*judged, reduction=exact[what].numel())
        except AssertionError as error:
            return f"{what}: {error}"
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", TWINS)
def test_as_torch(name, dtype, samples):
    given = samples[name, dtype]
    assert given, "torch has samples of this name"
    found = [f"{short(s)}: {d}" for s in given if (d := difference(name, s, dtype)) is not None]
    assert not found, f"{len(found)} of {len(given)} differ:\n" + "\n".join(found)


def test_every_refusal_has_a_sample(samples):
    for refused in REFUSED:
        assert any(refused.applies(name, s) for (name, _), given in samples.items() for s in given), refused.why
