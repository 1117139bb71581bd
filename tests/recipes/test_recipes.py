"""The recipes of fastmlp.recipes in their quick form, how they compare, and `fastmlp reproduce`."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fastmlp import cli
from fastmlp.recipes import (
    RECIPES,
    Settings,
    basic,
    derivatives,
    outer_product,
    quickstart,
    run_recipe,
    softmax_squared,
)
from fastmlp.recipes.base import Recorder, derivative
from tests.support.steps import one_thread  # noqa: F401


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings(quick=True, data="bundled")


@pytest.mark.parametrize("name", RECIPES)
def test_quick_form(settings, name):
    """Every verdict of every recipe is good, every plot can be drawn."""
    outcome = run_recipe(name, settings)
    assert outcome.results
    assert [result for result in outcome.results if not result.good] == []
    assert all(set(result.document.split(",")) <= {"000", "001", "002", "003"} for result in outcome.results)
    for draw in outcome.plots.values():
        figure = Figure()
        draw(figure)
        assert figure.axes
        assert any(ax.lines for ax in figure.axes)
    seconds = sum(result.seconds for result in outcome.results)
    assert 0 < seconds <= outcome.seconds


class TestVerdicts:
    """A recipe whose formula is wrong says so."""

    def bad(self, name: str, settings: Settings) -> list[str]:
        outcome = run_recipe(name, settings)
        assert not outcome.good
        return [result.claim for result in outcome.results if not result.good]

    def test_another_step_size(self, monkeypatch, settings):
        train = outer_product.train
        monkeypatch.setattr(outer_product, "LR", 0.1 + 1e-9)
        monkeypatch.setattr(outer_product, "losses_of_the_document", lambda: [0.16**k for k in range(10)])
        assert train is outer_product.train
        assert any("0.16000000000000011" in claim for claim in self.bad("outer-product", settings))

    def test_a_wrong_jacobian(self, monkeypatch, settings):
        monkeypatch.setattr(softmax_squared, "jacobian", lambda p: torch.diag_embed(p * (1 - p)))
        claims = self.bad("softmax-squared", settings)
        assert any("explicit Jacobian" in claim for claim in claims)
        assert any("by differences" in claim for claim in claims)

    def test_a_wrong_derivative(self, monkeypatch, settings):
        monkeypatch.setattr(derivatives, "_slope", lambda z, activation: torch.full_like(z, 0.25))
        assert any("tanh" in claim for claim in self.bad("derivatives", settings))

    @pytest.mark.parametrize(
        ("module", "loop", "arguments"),
        [(quickstart, "as_the_script", ()), (basic, "as_the_document", ("sigmoid", True))],
        ids=["quickstart", "basic"],
    )
    def test_a_loop_that_does_something_else(self, monkeypatch, settings, module, loop, arguments):
        monkeypatch.setattr(module, "STEPS", 2)
        monkeypatch.setattr(module, loop, lambda model, images, labels: None)
        train, _ = settings.images()
        recorder = Recorder("test")
        module._equality(recorder, *arguments, train.images, train.labels)
        assert [result.good for result in recorder.results] == [False]


class TestRecorder:
    def verdict(self, actual, expected, tolerance, **options) -> bool:
        recorder = Recorder("test")
        recorder.close("000", "claim", actual, expected, tolerance, **options)
        (result,) = recorder.results
        return result.good

    def test_close(self):
        assert self.verdict(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), 0.5)
        assert not self.verdict(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), 0.49)
        assert self.verdict(100.0, 101.0, 0.01, relative=True)
        assert not self.verdict(1e-9, 2e-9, 0.4, relative=True)
        assert self.verdict(0.0, 0.0, 0.0, relative=True)

    def test_nan_and_other_shapes_are_bad(self):
        assert not self.verdict(torch.tensor(math.nan), 1.0, 10.0)
        assert not self.verdict(torch.tensor(math.inf), math.inf, 10.0)
        assert not self.verdict(torch.ones(2), torch.ones(1), 10.0)


class TestDerivative:
    def test_layout_is_the_notes(self):
        """Rows are inputs, columns are outputs."""
        a = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).double()
        torch.testing.assert_close(derivative(lambda v: a @ v, torch.zeros(3).double()), a.t())

    def test_error_of_fourth_order(self):
        x = torch.tensor(0.7, dtype=torch.float64)
        errors = [abs(derivative(torch.exp, x, h).item() - math.exp(0.7)) for h in (0.2, 0.1)]
        assert errors[0] / errors[1] == pytest.approx(16, rel=0.05)


class TestSettings:
    def test_the_full_form_needs_the_full_data(self):
        with pytest.raises(FileNotFoundError, match=r"FashionMNIST subset 6000 train.*quick form"):
            Settings(data="bundled").images()

    def test_the_quick_form_takes_a_part(self):
        train, test = Settings(quick=True, data="bundled").images()
        assert (len(train), len(test)) == (6_000, 1_000)

    def test_unknown_recipe(self):
        with pytest.raises(ValueError, match="'outer'; expected one of outer-product"):
            run_recipe("outer")


class TestCommand:
    def test_list(self, capsys):
        assert cli.main(["reproduce", "--list"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == list(RECIPES)

    def test_table_and_plot(self, capsys, tmp_path):
        assert cli.main(["reproduce", "outer-product", "--plot", str(tmp_path / "plots")]) == 0
        out = capsys.readouterr().out
        assert "0.16000000000000011" in out
        assert "all good" in out
        with Image.open(tmp_path / "plots" / "outer-product.png") as image:
            assert image.width > 1000

    def test_json_is_all_of_stdout(self, capsys):
        argv = ["reproduce", "derivatives", "softmax-squared", "--quick", "--data", "bundled", "--json"]
        assert cli.main(argv) == 0
        captured = capsys.readouterr()
        (line,) = captured.out.splitlines()
        summary = json.loads(line)
        assert summary["good"] is True
        assert summary["quick"] is True
        assert [system["name"] for system in summary["systems"]] == ["softmax-squared", "derivatives"]
        fields = {"document", "claim", "obtained", "tolerance", "good", "seconds"}
        assert all(set(result) == fields for system in summary["systems"] for result in system["results"])
        assert "subset" in summary["dataset"]
        assert "dA/dZ is diagonal" in captured.err, "the tables"

    def test_a_bad_verdict_is_exit_code_1(self, capsys, monkeypatch):
        monkeypatch.setattr(outer_product, "PRINTED", ("1.0", "0.17", "6.871947673606854e-08"))
        assert cli.main(["reproduce", "outer-product"]) == 1
        out = capsys.readouterr().out
        assert "BAD" in out
        assert "1 bad" in out

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([], "give the names of systems, or --all"),
            (["--all", "basic"], "give the names of systems, or --all"),
            (["fastest"], "unknown system 'fastest'; expected one of outer-product"),
            (["basic", "--data", "bundled"], "the documents' accuracies belong to the full data"),
            (["basic", "--data", "/no/such/folder"], "/no/such/folder does not exist"),
            (["outer-product", "--plot", __file__], "is a file; expected a folder"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_wrong_input_is_exit_code_2(self, capsys, argv, message):
        assert cli.main(["reproduce", *argv]) == 2
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert message in line


def test_results_are_plain_data(settings):
    outcome = run_recipe("outer-product", settings)
    assert outcome.as_dict()["results"][0] == dataclasses.asdict(outcome.results[0])
    json.dumps(outcome.as_dict())
