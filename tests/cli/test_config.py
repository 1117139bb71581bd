"""``--config`` and ``--print-config``, and the options that come from the rules of the optimizers."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

import fastmlp
from fastmlp import cli
from fastmlp.cli import common, options
from fastmlp.cli.train import command
from fastmlp.step.optimizers import OPTIMIZERS
from fastmlp.step.train_step import arguments
from fastmlp.train.checkpoint import load_checkpoint
from fastmlp.train.initial import initialize_
from tests.cli.test_run_folder import small, train  # noqa: F401


def run(capsys, *argv: object, code: int = 0) -> str:
    """What the command prints, on stdout or, if it fails, on stderr in one line."""
    assert cli.main([str(arg) for arg in argv]) == code
    captured = capsys.readouterr()
    if code:
        assert captured.err.count("\n") == 1
    return captured.err if code else captured.out


ARGUMENTS = [
    [],
    ["--optimizer", "adamw", "--betas", "0.5", "0.75", "--eps", "1e-5", "--weight-decay", "0.125", "--lr", "3e-4"],
    ["--sizes", "784-7-10", "--epochs", "3", "--no-nesterov", "--momentum", "0.25", "--max-grad-norm", "2"],
    ["--param-group", "*.bias:weight-decay=0", "--param-group", "layers.0.*:lr=1,weight_decay=2", "--no-cuda-graph"],
    ["--product-dtype", "bfloat16", "--class-weight", "1,2.5", "--ema-decay", "0.9", "--ema-warmup"],
    ["--data", 'a "folder"\t\\ \x7f é', "--validation", "0.1", "--patience", "3", "--overwrite", "--json"],
]


@pytest.mark.parametrize("argv", ARGUMENTS, ids=["nothing", "adamw", "sgd", "groups", "step", "texts"])
def test_round_trip(capsys, tmp_path, argv):
    """What --print-config prints is a file that stands for the same options."""
    path = tmp_path / "train.toml"
    text = run(capsys, "train", *argv, "--print-config")
    path.write_text(text, encoding="utf-8")
    assert run(capsys, "train", "--config", path, "--print-config") == text
    values = {}
    for args in (argv, ["--config", str(path)]):
        context = command.make_context("train", [*args, "--print-config"])
        values[tuple(args)] = {**context.params, "config": None}
    first, second = values.values()
    assert first == second


def test_a_file_trains(capsys, tmp_path, small):  # noqa: F811
    """The command line counts before the file; an underscore counts as a dash."""
    path = tmp_path / "train.toml"
    path.write_text('optimizer = "adamw"\nbetas = [0.8, 0.9]\nweight_decay = 0\nlr = 1\nsizes = [784, 5, 10]\nseed = 4')
    argv = ["--config", path, "--lr", "0.01", "--epochs", 1]
    config = json.loads(run(capsys, "train", *argv, "--out", tmp_path / "run", "--json"))["config"]
    expected = {"optimizer": "adamw", "betas": [0.8, 0.9], "eps": 1e-8, "weight_decay": 0.0, "lr": 0.01, "seed": 4}
    assert {name: config[name] for name in expected} == expected
    assert config["sizes"] == [784, 5, 10]
    assert "momentum" not in config
    resumed = ["train", "--resume", tmp_path / "run", "--config", path]
    assert "--lr 1 differs from the run to resume, which has --lr 0.01" in run(capsys, *resumed, code=2)
    run(capsys, *resumed, "--lr", "0.01")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs = ", "is not TOML: Invalid value"),
        ("epoch = 3", "has 'epoch', which is no option. Did you mean 'epochs'?"),
        ("swoosh = 3", "has 'swoosh', which is no option; see --help"),
        ("resume = 'runs/x'", "has 'resume', which is no option"),
        ("config = 'x'", "has 'config', which is no option"),
        ("[train]\nepochs = 3", "has 'train', which is no option"),
        ("epochs = 3.5", "expected epochs to be a whole number, got 3.5"),
        ("epochs = true", "expected epochs to be a whole number, got True"),
        ("lr = '0.1'", "expected lr to be a number, got '0.1'"),
        ("nesterov = 1", "expected nesterov to be true or false, got 1"),
        ("betas = 0.9", "expected betas to be a list of 2 numbers, got 0.9"),
        ("betas = [0.9]", "expected betas to be a list of 2 numbers, got [0.9]"),
        ("param-group = '*.bias:lr=1'", "expected param-group to be a list of texts in quotes, got '*.bias:lr=1'"),
        ("param-group = ['*.bias']", "'*.bias' is no group of parameters"),
        ("data = 3", "expected data to be a text in quotes, got 3"),
        ("sizes = [784, 0.5]", 'expected sizes to be sizes such as "784-512-512-10" or [784, 512, 512, 10]'),
        ("sizes = [784, 0]", "'784-0' is not two or more positive whole numbers"),
        ("epochs = 0", "Invalid value for '--epochs': 0 is not in the range"),
        ("activation = 'Relu'", "Did you mean 'relu'?"),
        ("momentum = 1.0", "Invalid value for '--momentum': 1.0 is not a finite number of at least 0 and below 1"),
    ],
)
def test_mistakes_in_a_file(capsys, tmp_path, text, words):
    path = tmp_path / "train.toml"
    path.write_text(text)
    assert words in run(capsys, "train", "--config", path, code=2)


def test_a_file_that_is_not_there(capsys, tmp_path):
    assert "--config: [Errno 2] No such file" in run(capsys, "train", "--config", tmp_path / "none", code=2)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "is not TOML" in run(capsys, "train", "--config", tmp_path / "binary", code=2)


# The options of the rules


def test_every_setting_of_every_rule_is_an_option(capsys):
    text = " ".join(run(capsys, "train", "--help").split())
    for rule in OPTIMIZERS.values():
        for name, value in options.defaults(rule).items():
            assert options.checked_settings(rule.name, {})[name] == value
            assert f" {options.option_of(name)} " in text
    assert f"[{'|'.join(OPTIMIZERS)}]" in text


def test_a_new_rule_has_its_options(capsys, monkeypatch):
    """Nothing but the rule says what the option is."""

    @dataclasses.dataclass
    class New(OPTIMIZERS["sgd"]):
        shake: bool = False
        name = "new"

    monkeypatch.setitem(OPTIMIZERS, "new", New)
    assert options.settings()["shake"] == {"new": False}
    assert options.settings()["momentum"]["new"] == 0.9


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--optimizer", "adamw", "--momentum", "0.5"],
            "adamw has no --momentum; it has --lr, --weight-decay",
        ),
        (["--betas", "0.9", "0.99"], "--optimizer sgd has no --betas; it has --lr, --weight-decay"),
        (["--optimizer", "adam_w"], "Did you mean 'adamw'?"),
        (["--optimizer", "adamw", "--betas", "0.9", "1"], "'1' is not a finite number of at least 0 and below 1"),
        (["--optimizer", "adamw", "--eps", "-1"], "'-1' is not a finite number of at least 0"),
        (["--max-grad-norm", "0"], "'0' is not a finite number above 0"),
        (["--nesterov", "--momentum", "0"], "--nesterov needs a --momentum above 0"),
        (
            ["--patience", "3", "--data", "bundled"],
            "--patience needs held-out rows to judge the epochs by",
        ),
        (["--patience", "0"], "0 is not in the range"),
        (
            ["--param-group", "*.bias"],
            "'*.bias' is no group of parameters; expected names or patterns of names, a colon",
        ),
        (["--param-group", "*.bias:eps=1"], "and lr or weight-decay or both, such as '*.bias:weight-decay=0'"),
        (["--param-group", "*.bias:lr=1,lr=2"], "'*.bias:lr=1,lr=2' is no group"),
        (["--param-group", "*.bias,:lr=1"], "'*.bias,:lr=1' is no group"),
        (["--param-group", "*.bias:lr=x"], "could not convert string to float: 'x'"),
        (["--param-group", "*.bias:lr=-1"], "expected a learning rate of at least 0, got lr=-1.0"),
        (
            ["--param-group", "bias:lr=1", "--data", "bundled"],
            "no parameter of the model is named 'bias'; the names are",
        ),
        (
            ["--param-group", "*.bias:lr=1", "--param-group", "layers.0.*:lr=1", "--data", "bundled"],
            "layers.0.bias is in param groups 0 and 1; name each parameter once",
        ),
        (["--product-dtype", "float64"], "'float64' is not one of 'float16', 'bfloat16'"),
        (
            ["--product-dtype", "float16", "--engine", "autograd", "--data", "bundled"],
            "--product-dtype needs --engine step",
        ),
    ],
)
def test_wrong_options(capsys, argv, words):
    assert words in run(capsys, "train", *argv, code=2)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_trains(capsys, tmp_path, small, name):  # noqa: F811
    summary = json.loads(run(capsys, "train", "--optimizer", name, "--sizes", "784-4-10", "--epochs", 2,
                             "--out", tmp_path / "run", "--json"))  # fmt: skip
    assert summary["config"]["optimizer"] == name
    assert summary["history"][1]["train_loss"] < summary["history"][0]["train_loss"]


def test_options_of_the_step(capsys, tmp_path, small):  # noqa: F811
    """No decay on biases, and 16-bit products, as TrainStep has them; the run's own options count when it goes on."""
    argv = ["train", "--optimizer", "adamw", "--weight-decay", "3", "--sizes", "784-4-10", "--epochs", 2, "--json"]
    more = ["--param-group", "*.bias:weight-decay=0", "--product-dtype", "bfloat16", "--no-cuda-graph"]
    found = json.loads(run(capsys, *argv, *more, "--out", tmp_path / "run"))
    step = {"param_group": ["*.bias:weight-decay=0"], "product_dtype": "bfloat16", "cuda_graph": False}
    assert {name: found["config"].get(name) for name in step} == step
    data, _ = common.load_data(None, torch.device("cpu"), "cross_entropy")
    model = initialize_(fastmlp.MLP([784, 4, 10], "sigmoid"), 0)
    groups = [{"params": "*.bias", "weight_decay": 0.0}]
    settings = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 3.0, "epochs": 2, "dtype": torch.bfloat16}
    fastmlp.fit(model, data, param_groups=groups, **settings)
    loaded, _ = load_checkpoint(tmp_path / "run")
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded[name], parameter)
    assert "--param-group '*.bias:lr=1' differs from the run to resume, which has --param-group '*.bias:we" in run(
        capsys, "train", "--resume", tmp_path / "run", "--param-group", "*.bias:lr=1", code=2
    )
    again = run(capsys, "train", "--resume", tmp_path / "run", "--epochs", 3, "--cuda-graph", "--json")
    assert {**json.loads(again)["config"], "epochs": 2, "cuda_graph": False} == found["config"]


def test_every_argument_of_a_step_is_an_option():
    """But the process group, which torchrun gives; see options.py for another name."""
    named = {"param_groups": "param_group", "dtype": "product_dtype"}
    ours = {option.name for option in command.params}
    for name in arguments():
        assert name in ("model", "process_group") or named.get(name, name) in ours, name
