"""The command line: results, files, and one line with exit code 2 for every wrong input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from PIL import Image

import fastmlp
from fastmlp import cli
from fastmlp.activations import ACTIVATIONS
from fastmlp.backend import BACKENDS
from fastmlp.cli import common, selfcheck
from fastmlp.cli import train as train_command
from fastmlp.cli.run_folder import RESULTS
from fastmlp.data import load_fashion_mnist
from fastmlp.train.checkpoint import read_checkpoint, save_checkpoint
from fastmlp.train.engines import ENGINES
from fastmlp.train.schedules import SCHEDULES

SMALL = ["--data", "bundled", "--sizes", "784-16-10", "--epochs", "2"]


@pytest.fixture(autouse=True)
def _default_backend():
    yield
    fastmlp.set_backend("auto")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder: 784-32-10 after two epochs on the bundled subset."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    argv = ["train", "--data", "bundled", "--sizes", "784-32-10", "--epochs", "2", "--activation", "relu"]
    assert cli.main([*argv, "--out", str(folder)]) == 0
    return folder


def run(*argv) -> int:
    return cli.main([str(arg) for arg in argv])


def json_of(capsys, *argv) -> dict:
    """The JSON of a command that succeeds; standard output must have nothing else."""
    assert run(*argv, "--json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    return json.loads(lines[0])


def error_of(capsys, *argv, code: int = 2) -> str:
    """The one line that a command prints when it fails."""
    assert run(*argv) == code
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("fastmlp: error: ")
    return lines[0]


def process(*argv, **options) -> subprocess.CompletedProcess:
    """The command line as a process of its own."""
    command = [sys.executable, "-W", "error", "-m", "fastmlp", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


# Help and version


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"fastmlp {fastmlp.__version__}\n"


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_help_names_every_command(capsys, argv):
    assert run(*argv) == 0
    captured = capsys.readouterr()
    assert all(f"\n  {name}" in captured.out for name in cli.COMMANDS)
    assert captured.err == ""


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_of_every_command(capsys, command):
    assert run(command, "--help") == 0
    assert f"fastmlp {command}" in capsys.readouterr().out


def test_choices_are_those_of_the_library():
    assert set(common.BACKENDS) == set(BACKENDS)
    assert set(train_command.SCHEDULES) == set(SCHEDULES)
    assert set(train_command.ENGINES) == set(ENGINES)
    assert all(isinstance(getattr(torch, dtype), torch.dtype) for dtype in train_command.DTYPES)


def test_process_and_light_import():
    script = (
        "import sys, fastmlp.cli; code = fastmlp.cli.main(['train', '--help']); print(*sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    assert not {"matplotlib", "rich.progress", "PIL.Image", "torchvision"} & set(modules)
    done = process("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fastmlp {fastmlp.__version__}\n", "")


# train


def test_train_prints_lines_and_writes_the_run(trained, capsys, tmp_path):
    out = tmp_path / "run"
    assert run("train", *SMALL, "--out", out) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert "FashionMNIST subset 6000 train (bundled with fastmlp)" in captured.out
    assert [line.split()[:2] for line in lines if line.startswith("epoch")] == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert lines[-3].startswith("test accuracy ")
    assert "\x1b" not in captured.out
    assert "\r" not in captured.out
    names = sorted(path.name for path in out.iterdir())
    assert names == sorted(RESULTS)
    for name in names:
        if name.endswith(".png"):
            with Image.open(out / name) as image:
                assert image.format == "PNG"


def test_train_json(capsys, tmp_path):
    out = tmp_path / "run"
    assert run("train", *SMALL, "--seed", "3", "--lr", "0.2", "--out", out, "--json") == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 1
    summary = json.loads(lines[0])
    assert 0.5 < summary["test_accuracy"] <= 1
    assert summary["test_loss"] > 0
    assert summary["epochs"] == 2
    assert summary["seconds"] > 0
    assert summary["total_seconds"] >= summary["seconds"]
    assert summary["images_per_second"] == pytest.approx(2 * 6000 / summary["seconds"])
    assert summary["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert summary["backend"] in ("triton", "torch")
    assert summary["dataset"] == "FashionMNIST subset 6000 train (bundled with fastmlp)"
    assert summary["seed"] == 3
    assert summary["versions"]["fastmlp"] == fastmlp.__version__
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0]
    assert summary["config"]["sizes"] == [784, 16, 10]
    assert summary["config"]["lr"] == 0.2
    assert [entry["epoch"] for entry in summary["history"]] == [1, 2]
    assert summary["history"][-1]["test_accuracy"] == summary["test_accuracy"]
    assert json.loads((out / "summary.json").read_text()) == summary
    assert "epoch 1/2" in captured.err
    assert read_checkpoint(out).metrics["test_accuracy"] == summary["test_accuracy"]


def test_train_twice_gives_the_same_model(capsys, tmp_path):
    results = [json_of(capsys, "train", *SMALL, "--out", tmp_path / name, "--seed", 1) for name in "ab"]
    assert results[0]["test_loss"] == results[1]["test_loss"]
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    other = json_of(capsys, "train", *SMALL, "--out", tmp_path / "c", "--seed", 2)
    assert other["test_loss"] != results[0]["test_loss"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_train_with_every_activation(capsys, tmp_path, activation):
    argv = ["--data", "bundled", "--sizes", "784,24,10", "--epochs", "1", "--activation", activation]
    summary = json_of(capsys, "train", *argv, "--out", tmp_path / "run")
    assert summary["config"]["activation"] == activation
    assert summary["test_accuracy"] > (0.4 if activation == "step" else 0.6)


@pytest.mark.parametrize(
    ("dtype", "schedule"),
    [("float32", "constant"), ("float16", "linear"), ("bfloat16", "cosine"), ("float64", "cosine")],
)
def test_train_options(capsys, tmp_path, dtype, schedule):
    argv = ["--dtype", dtype, "--schedule", schedule, "--momentum", "0", "--weight-decay", "1e-4", "--warmup", "0.2"]
    out = tmp_path / "run"
    summary = json_of(capsys, "train", *SMALL, *argv, "--batch-size", 100, "--device", "cpu", "--out", out)
    assert summary["config"]["dtype"] == dtype
    assert summary["config"]["weight_decay"] == 1e-4
    assert summary["test_accuracy"] > 0.5
    evaluated = json_of(capsys, "eval", out, "--data", "bundled", "--device", "cpu")
    assert evaluated["test_accuracy"] == summary["test_accuracy"]
    assert evaluated["test_loss"] == summary["test_loss"]


def test_new_run_folders(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [json_of(capsys, "train", *SMALL, "--epochs", "1")["checkpoint"] for _ in range(3)]
    name = "784-16-10-sigmoid-seed0"
    assert folders == [os.path.join("runs", n, "model.safetensors") for n in (name, f"{name}-2", f"{name}-3")]


def test_an_existing_run_is_replaced_only_on_demand(capsys, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    first = json_of(capsys, "train", *SMALL, "--out", out)
    assert "has a run already" in error_of(capsys, "train", *SMALL, "--out", out)
    assert json.loads((out / "summary.json").read_text()) == first
    second = json_of(capsys, "train", *SMALL, "--out", out, "--overwrite", "--seed", 9)
    assert json.loads((out / "summary.json").read_text()) == second
    assert (out / "notes.txt").read_text() == "mine"


def test_divergence_keeps_the_last_good_checkpoint(capsys, tmp_path, monkeypatch):
    from fastmlp.train.engines import StepEngine

    class Failing(StepEngine):
        calls = 0

        def epoch(self, *args):
            loss = super().epoch(*args)
            Failing.calls += 1
            return loss if Failing.calls == 1 else loss * float("nan")

    monkeypatch.setitem(ENGINES, "step", Failing)
    out = tmp_path / "run"
    assert run("train", *SMALL, "--out", out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "training diverged: the loss became nan in epoch 2" in error
    assert "Try a learning rate of 0.05 or smaller" in error
    assert f"The checkpoint of epoch 1 is in {out}" in error
    assert json_of(capsys, "eval", out, "--data", "bundled")["test_accuracy"] > 0.3


def test_divergence_at_once_leaves_nothing(capsys, tmp_path):
    out = tmp_path / "run"
    assert run("train", *SMALL, "--lr", "1e38", "--activation", "relu", "--out", out) == 1
    assert "No checkpoint was written" in capsys.readouterr().err
    assert not out.exists()


def test_interrupt_in_process(capsys, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastmlp.train.fit", interrupted)
    assert run("train", *SMALL, "--out", tmp_path / "run") == 130
    assert capsys.readouterr().err.strip() == "fastmlp: interrupted"
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c(tmp_path):
    argv = ["train", "--data", "bundled", "--epochs", "500", "--sizes", "784-32-10", "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        [sys.executable, "-m", "fastmlp", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background processes ignore the interrupt, and their children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as child:
        for line in child.stdout:
            if line.startswith("epoch "):
                break
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        out, error = child.communicate(timeout=60)
    assert child.returncode == 130
    assert error.strip() == "fastmlp: interrupted"
    assert "Traceback" not in out
    assert "The checkpoint of epoch" in out
    assert process("eval", tmp_path / "run", "--data", "bundled").returncode == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a pseudo-terminal")
def test_progress_bar_on_a_terminal(tmp_path):
    import pty

    parent, child = pty.openpty()
    argv = ["train", *SMALL, "--out", str(tmp_path / "run")]
    with subprocess.Popen(
        [sys.executable, "-m", "fastmlp", *argv],
        stdout=child,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    ) as running:
        os.close(child)
        shown = b""
        while True:
            try:
                block = os.read(parent, 4096)
            except OSError:  # the terminal closes with the process
                break
            if not block:
                break
            shown += block
    os.close(parent)
    assert running.returncode == 0, shown.decode()
    assert b"\x1b[" in shown
    assert b"epoch 2/2 \x1b" in shown or "━".encode() in shown
    assert b"test accuracy" in shown


def test_the_subset_is_announced(tmp_path, monkeypatch):
    """Without data and without a network, the bundled subset is used, and a warning says so."""
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    script = (
        "import sys, fastmlp.data.dataset as data, fastmlp.cli\n"
        "data.SOURCES = ('bundled',)\n"
        f"sys.exit(fastmlp.cli.main(['train', *{SMALL[2:]!r}, '--json', '--out', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("fastmlp: warning: FashionMNIST was not found, so the subset bundled with fastmlp")
    assert json.loads(done.stdout.splitlines()[-1])["dataset"].startswith("FashionMNIST subset 6000")


# eval and predict


def test_eval(capsys, trained):
    summary = json.loads((trained / "summary.json").read_text())
    for path in (trained, trained / "model.safetensors", trained / "model.json", trained / "model"):
        result = json_of(capsys, "eval", path, "--data", "bundled")
        assert result["test_accuracy"] == summary["test_accuracy"]
        assert result["test_loss"] == summary["test_loss"]
        assert result["images"] == 1000
    assert run("eval", trained, "--data", "bundled") == 0
    assert f"test accuracy {100 * summary['test_accuracy']:.2f} %" in capsys.readouterr().out


def test_predict_agrees_with_the_model(capsys, trained, tmp_path):
    _, test = load_fashion_mnist(source="bundled")
    names = []
    for number in range(12):
        pixels = test.images[number].reshape(28, 28)
        names.append(tmp_path / f"{number}.png")
        Image.fromarray((255 - pixels if number % 2 else pixels).numpy()).save(names[-1])
    model, _ = common.load_model(str(trained), torch.device("cpu"))
    with torch.no_grad():
        expected = torch.softmax(model(test.images[:12]), 1).topk(3)
    result = json_of(capsys, "predict", trained, *names, "--device", "cpu")
    assert [entry["file"] for entry in result["images"]] == [str(name) for name in names]
    for number, entry in enumerate(result["images"]):
        assert entry["inverted"] == bool(number % 2)
        assert [p["label"] for p in entry["predictions"]] == expected.indices[number].tolist()
        assert [p["probability"] for p in entry["predictions"]] == pytest.approx(expected.values[number].tolist())
        assert [p["class"] for p in entry["predictions"]] == [test.classes[p["label"]] for p in entry["predictions"]]
    assert run("predict", trained, names[0], names[1]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{names[0]}: {test.classes[expected.indices[0, 0]]} ")
    assert lines[1].endswith("(inverted)")


def test_predict_invert_option(capsys, trained, tmp_path):
    path = tmp_path / "gray.png"
    Image.new("L", (28, 28), 10).save(path)
    for option, inverted in (("--invert", True), ("--no-invert", False)):
        assert json_of(capsys, "predict", trained, path, option)["images"][0]["inverted"] is inverted


# doctor


def test_doctor(capsys):
    report = json_of(capsys, "doctor")
    assert report["ok"]
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["auto_backend"] == ("triton" if torch.cuda.is_available() else "torch")
    assert report["triton"]["runs_on"] in ("gpu", "interpreter", None)
    checked = {(check["backend"], check["kernel"]) for check in report["checks"]}
    both = set(selfcheck.CHECKS) - selfcheck.KERNELS_ONLY
    assert {kernel for backend, kernel in checked if backend == "torch"} == both
    if report["triton"]["runs_on"] is not None:
        assert {kernel for backend, kernel in checked if backend == "triton"} == set(selfcheck.CHECKS)
    assert all(check["passed"] and check["error"] <= check["allowed"] for check in report["checks"])


def test_doctor_fails_when_a_kernel_is_wrong(capsys, monkeypatch):
    from fastmlp.cli import doctor
    from fastmlp.ops import torch_ops

    right = torch_ops.linear_wgrad

    def wrong(dz, x, *, bias=True):
        dw, db = right(dz, x, bias=bias)
        return dw * 1.5, db

    def raises(*args, **kwargs):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(doctor, "_interpreted", lambda: [])
    monkeypatch.setattr(torch_ops, "linear_wgrad", wrong)
    monkeypatch.setattr(torch_ops, "linear_dgrad", raises)
    assert run("doctor") == 1
    out = capsys.readouterr().out
    assert out.count("FAILED") == 6
    assert "FAILED  RuntimeError: no kernel image is available" in out
    assert "FAILED  dW (" in out
    verdicts = [line.split() for line in out.splitlines() if line.split()[:2] == ["torch", "cpu"]]
    assert {kernel for _, _, kernel, *_ in verdicts} == set(selfcheck.CHECKS) - selfcheck.KERNELS_ONLY


@pytest.mark.parametrize(
    ("code", "message"),
    [("import sys; sys.exit('it broke')", "failed: it broke"), ("print('no json')", "gave no results")],
)
def test_doctor_reports_a_broken_interpreter(monkeypatch, code, message):
    from fastmlp.cli import doctor

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kwargs: real([sys.executable, "-c", code], **kwargs))
    (result,) = doctor._interpreted()
    assert not result["passed"]
    assert message in result["message"]


GPU = {"capability": "9.0", "memory_bytes": 80 << 30}


@pytest.fixture
def processes(monkeypatch):
    """The commands that the doctor starts, each answered by a check that passed."""
    commands = []

    def answer(command, **options):
        commands.append(command)
        kernel, dtype = (command[command.index(f"--{name}") + 1] for name in ("kernels", "dtypes"))
        check = {"kernel": kernel, "dtype": dtype, "passed": True}
        return subprocess.CompletedProcess(command, 0, json.dumps([check]), "")

    monkeypatch.setattr(subprocess, "run", answer)
    return commands


@pytest.mark.parametrize(
    ("capability", "everything", "dtypes"),
    [
        ("9.0", False, ["float32", "bfloat16"]),
        ("9.0", True, ["float32", "bfloat16", "float16"]),
        ("7.5", False, ["float32", "float16"]),
        ("7.5", True, ["float32", "float16"]),
    ],
)
def test_doctor_on_a_gpu_checks_what_it_is_asked_for(processes, capability, everything, dtypes):
    from fastmlp.cli import doctor

    checks = doctor._on_gpu({**GPU, "capability": capability}, everything)
    assert [(check["kernel"], check["dtype"]) for check in checks] == [
        (kernel, dtype) for kernel in selfcheck.CHECKS for dtype in dtypes
    ]
    assert {command[command.index("--problems") + 1] for command in processes} == {"full" if everything else "short"}
    assert {command[command.index("--device") + 1] for command in processes} == {"cuda"}


@pytest.mark.parametrize(("cores", "gib", "room"), [(3, 80, 3), (64, 6.5, 6), (64, 0.5, 1)])
def test_doctor_starts_as_many_processes_as_there_is_room_for(processes, monkeypatch, cores, gib, room):
    from fastmlp.cli import doctor

    answer, together, running = subprocess.run, threading.Barrier(room), []

    def run(command, **options):
        running.append(command)
        assert len(running) <= room
        together.wait(timeout=60)  # for as many as there is room for
        running.remove(command)
        return answer(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert len(doctor._on_gpu({**GPU, "memory_bytes": int(gib * 2**30)}, False)) == 18
    assert len(processes) == 18


def test_doctor_reports_the_one_process_that_dies(processes, monkeypatch):
    from fastmlp.cli import doctor

    answer = subprocess.run

    def run(command, **options):
        if "head" in command and "float32" in command:
            raise subprocess.CalledProcessError(-11, command, "", "")
        return answer(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    checks = doctor._on_gpu(GPU, False)
    (dead,) = (check for check in checks if not check["passed"])
    assert (dead["kernel"], dead["dtype"], dead["device"]) == ("head", "float32", "cuda")
    assert dead["message"] == "its process failed: exit code -11"
    assert "FAILED" in doctor._verdict(dead)


@pytest.mark.slow
def test_doctor_runs_kernels_side_by_side(monkeypatch):
    """The interpreter stands in for the GPU in the processes."""
    from fastmlp.cli import doctor

    real = subprocess.run

    def run(command, **options):
        command = [{"cuda": "cpu", "short": "small"}.get(word, word) for word in command]
        return real(command, **{**options, "env": {**os.environ, "TRITON_INTERPRET": "1"}})

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(selfcheck, "CHECKS", {name: selfcheck.CHECKS[name] for name in ("activation_bwd", "head")})
    checks = doctor._on_gpu(GPU, False)
    assert [(check["kernel"], check["dtype"], check["passed"]) for check in checks] == [
        (kernel, dtype, True) for kernel in ("activation_bwd", "head") for dtype in ("float32", "bfloat16")
    ], checks


def test_checks_notice_every_kind_of_wrong_result(monkeypatch):
    right = torch.linspace(-1, 1, 9, dtype=torch.float64)
    holed = right.float()
    holed[4] = float("nan")
    results = {"off": right.float() + 1e-4, "nan": holed, "shape": right.float()[:8], "right": right.float()}

    def check(problem, backend):
        yield selfcheck.Comparison("Y", results[wanted], right, right.float(), 1)

    monkeypatch.setattr(selfcheck, "CHECKS", {"check": check})
    for wanted in results:
        (result,) = selfcheck.run_checks("cpu", "torch", (torch.float32,), selfcheck.SMALL)
        assert result.passed == (wanted == "right")
        assert (result.message == "") == result.passed
        json.dumps(vars(result), allow_nan=False)


# Wrong input


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["--bogus"], "No such option"),
        (["train", "--bogus"], "No such option '--bogus'"),
        (["train", "surplus"], "unexpected extra argument"),
        (["train", "--activation", "swoosh"], "'swoosh' is not one of 'identity', 'sigmoid'"),
        (["train", "--schedule", "swoosh"], "'swoosh' is not one of 'constant', 'linear', 'cosine'"),
        (["train", "--backend", "jax"], "'jax' is not one of"),
        (["train", "--engine", "jax"], "'--engine': 'jax' is not"),
        (["train", "--dtype", "int8"], "'int8' is not one of"),
        (["train", "--lr", "0"], "'0' is not a finite number above 0"),
        (["train", "--lr", "-1"], "'-1' is not a finite number above 0"),
        (["train", "--lr", "nan"], "'nan' is not a finite number above 0"),
        (["train", "--lr", "inf"], "'inf' is not a finite number above 0"),
        (["train", "--lr", "fast"], "'fast' is not a finite number above 0"),
        (["train", "--momentum", "1"], "'1' is not a finite number of at least 0 and below 1"),
        (["train", "--weight-decay", "-1"], "'-1' is not a finite number of at least 0"),
        (["train", "--warmup", "1.5"], "below 1"),
        (["train", "--epochs", "0"], "0 is not in the range"),
        (["train", "--epochs", "many"], "'many' is not a valid integer"),
        (["train", "--batch-size", "0"], "0 is not in the range"),
        (["train", "--seed", "-1"], "-1 is not in the range"),
        (["train", "--sizes", "784"], "'784' is not two or more positive whole numbers"),
        (["train", "--sizes", "784-0-10"], "'784-0-10' is not"),
        (["train", "--sizes", "784-a-10"], "'784-a-10' is not"),
        (["train", "--sizes", "784-99999999999-10"], "is not two or more"),
        (["train", "--sizes", "100-10"], "--sizes 100-10 must start with 784"),
        (["train", "--sizes", "784-7"], "end with 10 classes"),
        (["train", "--device", "toaster"], "unknown device 'toaster'; expected auto, cpu, cuda or cuda:N"),
        (["train", "--device", "meta"], "device 'meta' is not supported"),
        (["train", "--device", "cuda:999"], "device 'cuda:999' is not available"),
        (["train", "--data", "/no/such/folder"], "/no/such/folder does not exist"),
        (["eval", "/no/such/checkpoint"], "there is no checkpoint /no/such/checkpoint"),
        (["predict", "/no/such/checkpoint", "image.png"], "there is no checkpoint"),
        (["eval"], "Missing argument 'CHECKPOINT'"),
        (["predict", "x"], "Missing argument 'IMAGE...'"),
        (["doctor", "--data", "/no/such/folder"], "/no/such/folder does not exist"),
    ],
)
def test_wrong_options(capsys, argv, words):
    assert words in error_of(capsys, *argv)


def test_wrong_input_as_a_process():
    done = process("train", "--data", "/no/such/folder")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fastmlp: error: ")
    assert done.stderr.count("\n") == 1


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "device 'cuda' is not available" in error_of(capsys, "train", "--device", "cuda")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_triton_on_the_cpu(capsys):
    error = error_of(capsys, "train", *SMALL, "--backend", "triton", "--device", "cpu")
    assert "backend 'triton'" in error


def test_folder_without_data(capsys, tmp_path):
    assert "is empty; expected the idx files" in error_of(capsys, "train", "--data", tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"half")
    assert "has only 1 of the 4" in error_of(capsys, "train", "--data", tmp_path)


def test_run_folder_that_is_a_file(capsys, tmp_path):
    path = tmp_path / "file"
    path.touch()
    assert "is a file; expected a folder" in error_of(capsys, "train", *SMALL, "--out", path)
    assert "fastmlp: error: " in error_of(capsys, "train", *SMALL, "--out", path / "below")


def copied(trained, folder):
    folder.mkdir()
    for name in ("model.json", "model.safetensors"):
        (folder / name).write_bytes((trained / name).read_bytes())
    return folder


def test_damaged_checkpoints(capsys, trained, tmp_path):
    cut = copied(trained, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-9])
    assert "truncated" in error_of(capsys, "eval", cut)

    garbled = copied(trained, tmp_path / "garbled")
    (garbled / "model.json").write_text("{")
    assert "is not JSON" in error_of(capsys, "eval", garbled)

    alone = copied(trained, tmp_path / "alone")
    (alone / "model.safetensors").unlink()
    assert "weights of the checkpoint are missing" in error_of(capsys, "predict", alone, "x.png")
    assert "there is no checkpoint" in error_of(capsys, "eval", tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"activation": "relu", "dtype": "float32"}, "lacks sizes"),
        ({"sizes": [784, 10], "activation": "swoosh"}, "unknown activation 'swoosh'"),
        ({"sizes": [784, 10], "activation": "relu", "dtype": "int9"}, "has dtype 'int9'"),
        ({"sizes": [784, 12, 10], "activation": "relu"}, "do not fit its configuration: layers.0"),
        ({"sizes": "many", "activation": "relu"}, "expected sizes to be"),
        ({"sizes": 784, "activation": "relu"}, "int"),
    ],
)
def test_checkpoints_that_are_no_mlp(capsys, tmp_path, config, words):
    save_checkpoint(tmp_path / "model", fastmlp.MLP((784, 10)), config)
    assert words in error_of(capsys, "eval", tmp_path)


def test_checkpoint_of_other_sizes(capsys, tmp_path):
    save_checkpoint(tmp_path / "model", fastmlp.MLP((20, 5)), {"sizes": [20, 5], "activation": "relu"})
    for argv in (["eval", tmp_path], ["predict", tmp_path, "x.png"]):
        assert "has sizes 20-5 must start with 784" in error_of(capsys, *argv)


def test_images_that_cannot_be_read(capsys, trained, tmp_path):
    text = tmp_path / "text.png"
    text.write_text("hello")
    assert f"{text} is not an image" in error_of(capsys, "predict", trained, text)
    assert "No such file" in error_of(capsys, "predict", trained, tmp_path / "none.png")
    assert "Is a directory" in error_of(capsys, "predict", trained, tmp_path)


def test_a_mistake_of_the_program_is_not_reported_as_the_users(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("fastmlp.train.fit", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("train", *SMALL, "--out", tmp_path / "run")
