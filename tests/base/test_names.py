"""The suggestion for a name that does not exist."""

from __future__ import annotations

import pytest

import fastmlp
from fastmlp.activations import ACTIVATIONS
from fastmlp.base.names import did_you_mean, unknown


@pytest.mark.parametrize(
    ("name", "known", "meant"),
    [
        ("Relu", ACTIVATIONS, "relu"),
        ("LeakyReLU", ACTIVATIONS, "leaky_relu"),
        ("sigmod", ACTIVATIONS, "sigmoid"),
        ("fp16", ("float32", "float16", "bfloat16"), "float16"),
        ("BF16", ("float32", "float16", "bfloat16"), "bfloat16"),
        ("double", ("float32", "float64"), "float64"),
        ("trian", ("train", "eval"), "train"),
        ("swoosh", ACTIVATIONS, None),
        ("x" * 100_000, ACTIVATIONS, None),
        (None, ACTIVATIONS, None),
        (["relu"], ACTIVATIONS, None),
    ],
)
def test_suggestions(name, known, meant):
    assert did_you_mean(name, known) == (f". Did you mean {meant!r}?" if meant else "")


def test_the_message():
    assert unknown("mode", "atn", ("auto", "aten"), ", or None") == (
        "unknown mode 'atn'; expected one of auto, aten, or None. Did you mean 'aten'?"
    )


def test_in_the_library():
    with pytest.raises(ValueError, match=r"unknown activation 'Relu'; expected .*Did you mean 'relu'\?"):
        fastmlp.MLP((4, 3, 2), "Relu")
    with pytest.raises(ValueError, match=r"Did you mean 'onednn'\?"):
        fastmlp.set_cpu_gemm("OneDNN")
