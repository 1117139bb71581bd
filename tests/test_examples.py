"""examples/: every program runs, and the result that it prints is right."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.steps import one_thread  # noqa: F401

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture(autouse=True)
def _seed() -> Any:
    """The examples seed torch; the tests after them go on with the state from before."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def main(name: str, *arguments: str) -> Any:
    """The result of an example's ``main``, which ends with SystemExit if its own check fails."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)


def test_every_example_has_a_test_and_a_row():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {key.removeprefix("test_") for key in globals() if key.removeprefix("test_") in names}
    rows = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"| [{name}.py]({name}.py) |" in rows for name in names)


def test_cross_validation(capsys):
    means = main("cross_validation")
    # Too small a rate learns little in so few epochs, and too large a rate nothing.
    assert max(means, key=means.__getitem__) in (0.01, 0.03, 0.1)
    assert max(means.values()) > 0.75
    assert max(means[0.001], means[1.0]) < 0.6
    assert "30 networks 10-32-32-3" in capsys.readouterr().out


def test_ensemble_of_critics(capsys):
    costs = main("ensemble_of_critics")
    assert costs["best"] <= costs["learned"] < 1.1 * costs["best"]
    assert costs["learned"] < costs["no action"] / 4
    assert "most pessimistic" in capsys.readouterr().out


def test_tabular(capsys):
    recalls = main("tabular")
    assert recalls["plain"] + 0.05 <= recalls["weighted"]
    assert recalls["weighted"] > 0.7
    assert "stopped after" in capsys.readouterr().out


def test_neural_field(tmp_path, capsys):
    psnr = main("neural_field", str(tmp_path / "field.png"))
    assert psnr["coordinates"] + 3 < psnr["sines and cosines"]
    with Image.open(tmp_path / "field.png") as image:
        assert image.size == (384, 384)
    assert "PSNR" in capsys.readouterr().out
