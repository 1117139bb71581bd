"""``fastmlp bench`` and ``python -m bench``: files, the report from JSON alone, one line of error per wrong input."""

from __future__ import annotations

import importlib
import json
import sys

import click
import pytest
import torch

from bench import cli as bench_cli
from bench.measure.results import FORMAT, load
from bench.report.markdown import NOT_MEASURED
from fastmlp import cli

MACHINE = {
    "name": "Test CPU",
    "slug": "test-cpu-2-threads",
    "is_gpu": False,
    "threads": 2,
    "versions": {"python": "3.11", "torch": "2.14.1", "jax": None},
    "commit": "abcdef123456",
    "changed_files": [],
}


def entry(rival: str, label: str, seconds: list[float], error: float = 1e-7) -> dict:
    times = {"calls": 3, "seconds": seconds, "error": error, "allowed": 1e-5, "overall": error, "worst": "parameter 0"}
    return {"rival": rival, "label": label, "notes": "", "status": "ok", "reason": "", "setup_s": 0.1, **times}


def case(batch: int, axis: str = "") -> dict:
    absent = {"rival": "apex", "label": "apex.mlp", "notes": "", "status": "unavailable", "reason": "not installed"}
    wrong = {"rival": "bad", "label": "bad one", "notes": "", "status": "wrong", "reason": "parameter 0: over"}
    fast = [1e-3 * batch, 1.1e-3 * batch, 1.2e-3 * batch]
    results = [entry("fastmlp", "fastmlp TrainStep", fast), entry("eager", "PyTorch eager", [2.2e-3 * batch] * 3)]
    return {
        "problem": {"kind": "step", "name": f"784-8-10 batch {batch}", "dtype": "float32"},
        **{"axis": axis, "value": batch if axis else 0, "flops": 10**6 * batch, "bytes": 10**5, "rows": batch},
        "results": [*results, absent, wrong],
    }


def times(preset: str, cases: list[dict]) -> dict:
    head = {"format": FORMAT, "kind": "times", "preset": preset, "command": f"fastmlp bench {preset}"}
    peaks = {"flops float32": 1e11, "flops bfloat16": 2e11, "bytes": 1e10}
    rest = {"started": "2026-01-02T03:04:05+00:00", "rounds": 3, "machine": MACHINE, "peaks": peaks, "cases": cases}
    return {**head, **rest}


def accuracy() -> dict:
    curve = [{"epoch": 1.0, "seconds": 2.0, "accuracy": 0.85}, {"epoch": 2.0, "seconds": 4.0, "accuracy": 0.895}]
    runs = [
        {
            "seed": seed,
            "seconds": 4.0 + seed,
            "epochs": 2.0,
            "reached": {"0.89": 4.0 + seed, "0.9": None},
            "curve": curve,
        }
        for seed in range(3)
    ]
    contender = {"name": "fastmlp", "label": "fastmlp TrainStep", "settings": "SGD", "status": "ok", "reason": ""}
    absent = {"name": "jax", "label": "JAX jit", "settings": "SGD", "status": "unavailable", "reason": "not installed"}
    document = times("accuracy", [])
    about = {"kind": "accuracy", "data": "FashionMNIST", "seeds": 3, "targets": [0.89, 0.9], "looks_per_epoch": 4}
    return {**document, **about, "contenders": [{**contender, "setup_s": 0.5, "runs": runs}, absent]}


@pytest.fixture
def results(tmp_path):
    """A folder with a run of each kind."""
    folder = tmp_path / "results" / MACHINE["slug"]
    folder.mkdir(parents=True)
    runs = [times("full", [case(64)]), times("scaling", [case(n, "batch") for n in (1, 16, 256)]), accuracy()]
    for run in runs:
        (folder / f"{run['preset']}.json").write_text(json.dumps(run))
    return folder.parent


def run(*argv) -> int:
    return cli.main(["bench", *map(str, argv)])


def error_of(capsys, *argv) -> str:
    """The one line that a command prints when its input makes it fail."""
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("fastmlp: error: ")
    return line


def test_report_from_json_alone(results, tmp_path):
    target = tmp_path / "RESULTS.md"
    assert run("report", "--results", results, "--out", target) == 0
    text = target.read_text()
    drawn = {path.stem for path in results.glob("*/*.png")}
    assert drawn == {"batch", "error", "roofline", "accuracy"}
    for stem in drawn:
        assert f"](results/{MACHINE['slug']}/{stem}.png)" in text
    assert "Test CPU, 2 threads; torch 2.14.1; commit abcdef123456, 2026-01-02; command: fastmlp bench full" in text
    assert "**fastmlp TrainStep** | 70.4 ms | ±9 % | 2.00 (1.83–2.20)" in text  # 1.1e-3 x 64; eager takes twice as long
    assert "| fastmlp" not in text.partition("## Time to accuracy")[0].replace("**fastmlp", "")
    assert "5.0 ± 1.0 s" in text  # 4, 5 and 6 seconds
    assert "not reached" in text
    assert "apex.mlp | not installed" in text
    assert "bad one | wrong: parameter 0: over" in text
    assert NOT_MEASURED == "not measured yet: run `fastmlp bench full` on a GPU"
    assert text.count(NOT_MEASURED) >= 9  # the machine, the tables, the accuracy and every plot


def test_the_roofline_is_of_the_quick_run_where_there_is_no_full_one(results, tmp_path):
    folder = results / MACHINE["slug"]
    quick = json.loads((folder / "full.json").read_text()) | {"preset": "quick"}
    (folder / "quick.json").write_text(json.dumps(quick))
    (folder / "full.json").unlink()
    assert run("report", "--results", results, "--out", tmp_path / "RESULTS.md") == 0
    assert (folder / "roofline.png").exists()


def test_report_of_a_gpu_has_no_such_marks(results, tmp_path):
    for path in results.glob("*/*.json"):
        document = json.loads(path.read_text())
        document["machine"] = {**MACHINE, "is_gpu": True, "name": "Test GPU"}
        path.write_text(json.dumps(document))
    target = tmp_path / "RESULTS.md"
    assert run("report", "--results", results, "--out", target) == 0
    sections = target.read_text().split("\n## ")
    tables = [section for section in sections if section.startswith(("Machines", "Training step", "Time to accuracy"))]
    assert len(tables) == 3
    assert not any(NOT_MEASURED in table for table in tables)


def test_compare(results, tmp_path, capsys):
    path = results / MACHINE["slug"] / "full.json"
    document = load(path)
    document["cases"][0]["results"][0]["seconds"] = [1.0, 1.0, 1.0]
    slower = tmp_path / "slower.json"
    slower.write_text(json.dumps(document))
    assert run("compare", path, slower) == 0
    out = capsys.readouterr().out
    assert "slower" in out
    assert "1 slower, 0 faster, 1 same" in out
    assert run("compare", "--check", path, slower) == 1
    assert run("compare", "--check", path, path) == 0


def test_wrong_input(capsys, tmp_path, results):
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    other = tmp_path / "other.json"
    other.write_text("{}")
    good = results / MACHINE["slug"] / "full.json"
    assert "is not JSON" in error_of(capsys, "compare", bad, good)
    assert "is not a run of the benchmarks" in error_of(capsys, "compare", good, other)
    assert "No such file" in error_of(capsys, "compare", good, tmp_path / "absent.json")
    assert "accuracy" in error_of(capsys, "compare", good, good.with_name("accuracy.json"))
    assert "unknown device 'tpu!'" in error_of(capsys, "quick", "--device", "tpu!")
    assert "No such command" in error_of(capsys, "slow")
    assert "rounds" in error_of(capsys, "quick", "--rounds", "0")
    assert "absent" in error_of(capsys, "accuracy", "--data", tmp_path / "absent")
    assert "invalid" in error_of(capsys, "tune", "--dtype", "float64").lower()
    (results / "bad.d").mkdir()
    (results / "bad.d" / "bad.json").write_text("[1]")
    assert "bad.json is not a run" in error_of(capsys, "report", "--results", results, "--out", tmp_path / "R.md")
    assert "no runs" in error_of(capsys, "report", "--results", tmp_path / "empty", "--out", tmp_path / "R.md")


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="there is a GPU to tune for")
def test_tune_without_a_gpu(capsys):
    assert "torch finds none here" in error_of(capsys, "tune")


@pytest.mark.parametrize(("asked", "index"), [("cuda", 0), ("cuda:1", 1)])
def test_events_and_graphs_belong_to_the_device_that_is_meant(asked, index, monkeypatch):
    current = []
    monkeypatch.setattr("fastmlp.cli.common.select_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert bench_cli._device(asked, torch.get_num_threads()) == f"cuda:{index}"
    assert current == [index]


def test_command_in_captions_leaves_out_places(monkeypatch, tmp_path):
    commands = []

    def run_preset(chosen, device, command, log, *, rounds):
        commands.append(command)
        return times("quick", [case(64)])

    monkeypatch.setattr("bench.measure.runner.run_preset", run_preset)
    monkeypatch.setattr("bench.measure.machine.pin_threads", lambda threads: threads)
    assert run("quick", "--rounds", "2", "--device", "cpu", "--out", tmp_path) == 0
    assert run("--device", "cpu", f"--out={tmp_path}") == 0
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--out", str(tmp_path), "--no-report"])
    assert bench_cli.main() == 0
    assert commands == [
        "fastmlp bench quick --rounds 2 --device cpu",
        "fastmlp bench quick --device cpu",
        "python -m bench quick --device cpu --no-report",
    ]
    assert (tmp_path / "RESULTS.md").is_file()


def test_table_fits_eighty_columns(results, capsys):
    from bench.report.tables import print_accuracy, print_run

    print_run(load(results / MACHINE["slug"] / "full.json"))
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert "bad one: wrong: parameter 0: over" in out
    assert "apex.mlp: not installed (1 of 1 problems)" in out
    print_accuracy(load(results / MACHINE["slug"] / "accuracy.json"))
    assert "5.0 ± 1.0 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "part", "named"),
    [
        ("full --rounds 5 --out x", "full", "full --rounds 5"),
        ("full --rounds 5 --seeds=3", "scaling", "scaling --rounds 5"),
        ("full --threads 2 --rounds 5 --seeds 3", "accuracy", "accuracy --threads 2 --seeds 3"),
        ("full --rounds=5", "accuracy", "accuracy"),
        ("quick --rounds 5 --data=x", "quick", "quick --rounds 5"),
    ],
)
def test_the_parts_of_full_name_the_commands_that_repeat_them(given, part, named):
    words = given.split()
    group = click.Context(bench_cli.cli, info_name="fastmlp bench")
    context = click.Context(bench_cli.cli.commands[words[0]], parent=group, info_name=words[0])
    context.meta[bench_cli._ARGUMENTS] = words
    assert bench_cli._command_line(context, part) == f"fastmlp bench {named}"


def test_without_a_checkout(monkeypatch, capsys, tmp_path):
    """Run as in an installed wheel, which has no bench/ beside it."""
    module = importlib.import_module("fastmlp.cli.bench")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "site-packages" / "fastmlp" / "cli" / "bench.py"))
    assert module.checkout() is None
    monkeypatch.setattr(module, "command", module._absent())
    line = error_of(capsys, "full", "--rounds", "3")
    assert "not part of the installed package" in line
    assert "clone" in line
