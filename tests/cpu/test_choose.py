"""Which library multiplies on the CPU: modes, measured choices, equal results; and the memory of a training step."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp.activations import ACTIVATIONS
from fastmlp.base.losses import STEP_LOSSES
from fastmlp.cpu import cache, choose, onednn, whole_step
from tests.support.steps import (
    Reference,
    allocations,
    batches,
    check_float32,
    choices_of_products,
    converted,
    flat,
    for_step,
    fresh_choices,  # noqa: F401
    have_16_bit_products,
    have_fastest,
    needs_onednn,
    network,
    new_process,
    one_thread,  # noqa: F401
    problem,
)
from tests.support.torchs import OPTIMIZERS

SIZES = (13, 17, 11, 5)
#: Taken at import, because nothing is timed while other tests run.
TIMED = choose._fastest


@pytest.fixture(autouse=True)
def fresh(monkeypatch, fresh_choices) -> None:  # noqa: F811
    """Fresh choices, for which all products are large enough."""
    monkeypatch.setattr(choose, "_WORTH_MEASURING", 0)


def run(dtype: torch.dtype = torch.float32, optimizer: str = "sgd", steps: int = 5, **settings) -> Tensor:
    model = converted(network(SIZES, settings.pop("activation", "sigmoid")), dtype)
    step = fastmlp.TrainStep(model, **OPTIMIZERS[optimizer], **settings)
    for x, y in batches(*problem(SIZES, 70), 24, steps):
        step(*for_step(x, y, settings.get("dtype") or dtype))
    return flat(model)


@needs_onednn
@pytest.mark.parametrize("optimizer", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_onednn_within_the_budget(activation, optimizer):
    """The measurement on this machine may never choose oneDNN."""
    fastmlp.set_cpu_gemm("onednn")
    check_float32(network(SIZES, activation), batches(*problem(SIZES, 70), 24, 20), OPTIMIZERS[optimizer])


@needs_onednn
@pytest.mark.parametrize("rows", [1, 2, 65])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 1, 3), (64, 32, 10)], ids=str)
def test_onednn_shapes_and_strides(sizes, bias, rows):
    x, y = problem(sizes, rows)
    wide = torch.full((rows, sizes[0] + 3), float("nan"))
    wide[:, 1:-2] = x
    for optimizer in ("sgd", "momentum"):
        model = network(sizes, bias=bias)
        expected = Reference(model, OPTIMIZERS[optimizer]).train([(x, y)] * 3).flat()
        for batch in (x.float(), wide[:, 1:-2], x.float().t().contiguous().t()):
            fastmlp.set_cpu_gemm("onednn")
            narrow = converted(model, torch.float32)
            step = fastmlp.TrainStep(narrow, **OPTIMIZERS[optimizer])
            for _ in range(3):
                step(batch, y)
            assert (flat(narrow) - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("mode", ["aten", "auto"])
def test_each_mode_trains(mode):
    fastmlp.set_cpu_gemm(mode)
    assert fastmlp.get_cpu_gemm() == mode
    torch.testing.assert_close(run(), run(torch.float64), rtol=1e-4, atol=1e-5)


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="unknown mode 'mkl'; expected one of auto, aten, onednn"):
        fastmlp.set_cpu_gemm("mkl")
    monkeypatch.setattr(onednn, "available", lambda: False)
    with pytest.raises(RuntimeError, match="has no oneDNN linear operator; use 'auto' or 'aten'"):
        fastmlp.set_cpu_gemm("onednn")


@needs_onednn
def test_what_was_measured(monkeypatch):
    """Each product of each layer is measured once, for the power of two below the batch size."""
    have_fastest(monkeypatch, TIMED)
    fastmlp.set_cpu_gemm("auto")
    assert choose.choices() == {}
    run()
    threads = torch.get_num_threads()
    shapes = [(13, 17), (17, 11), (11, 5)]
    expected = {("linear sigmoid", 16, k, n, torch.float32, threads) for k, n in shapes[:2]}
    expected |= {("linear none", 16, *shapes[2], torch.float32, threads)}
    expected |= {("dgrad", 16, k, n, torch.float32, threads) for k, n in shapes[1:]}
    expected |= {("wgrad_update", 16, k, n, torch.float32, threads) for k, n in shapes}
    assert set(choices_of_products()) == expected
    assert set(choices_of_products().values()) <= {"aten", "onednn"}
    run(optimizer="momentum")
    kinds = {"linear sigmoid", "linear none", "dgrad", "wgrad", "wgrad_update"}
    assert {key[0] for key in choices_of_products()} == kinds


@needs_onednn
def test_small_products_are_not_measured(monkeypatch):
    monkeypatch.setattr(choose, "_WORTH_MEASURING", 24 * 13 * 17)
    monkeypatch.setattr(whole_step, "_step_way", lambda *args: "each")
    fastmlp.set_cpu_gemm("auto")
    run()
    assert {key[:4] for key in choose.choices()} == {("linear sigmoid", 16, 13, 17), ("wgrad_update", 16, 13, 17)}


@needs_onednn
def test_measured_once_for_batch_sizes_that_are_near(monkeypatch):
    fastmlp.set_cpu_gemm("auto")
    model = converted(network(SIZES), torch.float32)
    step = fastmlp.TrainStep(model, lr=0.1)
    x, y = for_step(*problem(SIZES, 70), torch.float32)
    step(x[:32], y[:32])
    known = choose.choices()
    for m in (33, 50, 63):
        step(x[:m], y[:m])
    assert choose.choices() == known
    step(x[:64], y[:64])
    assert len(choose.choices()) == 2 * len(known)
    assert {key[1] for key in choose.choices()} == {32, 64}


def test_the_median_decides(monkeypatch):
    """Each second call in a row counts. The way with the smallest time of all may be slow in most rounds."""
    now, calls = 0.0, dict.fromkeys(("aten", "each"), 0)

    def takes(name: str, seconds: Callable[[int], float]) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            calls[name] += 1
            now += seconds(calls[name])

        return run

    monkeypatch.setattr(choose.time, "perf_counter", lambda: now)
    often_slow = takes("aten", lambda call: 1e-6 if call % 6 == 0 else 1e-2)
    first_call_slow = takes("each", lambda call: 1e-3 if call % 2 == 0 else 1e-1)
    assert TIMED({"aten": often_slow, "each": first_call_slow}) == "each"
    assert calls == {"aten": 12, "each": 12}


def test_the_faster_one_is_chosen(monkeypatch):
    have_fastest(monkeypatch, TIMED)

    def trials(slow: str) -> Callable[[int], dict]:
        def wait(seconds: float) -> Callable[[], None]:
            from time import sleep

            return lambda: sleep(seconds)

        return lambda rows: {name: wait(0.02 if name == slow else 0.0) for name in ("aten", "onednn")}

    fastmlp.set_cpu_gemm("auto")
    assert choose.choose("a", 1, 1, 1, torch.float32, trials("aten")) == "onednn"
    assert choose.choose("b", 1, 1, 1, torch.float32, trials("onednn")) == "aten"


@needs_onednn
def test_choices_last_longer_than_the_process(monkeypatch):
    fastmlp.set_cpu_gemm("auto")
    run()
    choices, path = choose.choices(), cache.choices_path()
    content = json.loads(path.read_text())
    ((machine, kept),) = content.items()
    assert f"torch {torch.__version__}, fastmlp {fastmlp.__version__}" in machine
    assert len(kept) == len(choices)
    # The file gets the opposite of every measurement, so the choices below can only come from the file.
    swapped = {name: "aten" if choice == "onednn" else "onednn" for name, choice in kept.items()}
    path.write_text(json.dumps({"another machine": kept, machine: swapped}))
    new_process(monkeypatch)
    run()
    assert choose.choices() == {key: "aten" if c == "onednn" else "onednn" for key, c in choices.items()}
    run(optimizer="momentum")
    content = json.loads(path.read_text())
    assert content["another machine"] == kept
    assert swapped.items() < content[machine].items()


@needs_onednn
@pytest.mark.parametrize("content", ["", "[1]", '{"a": 3}', '{"a": {"b": 3}}', "\x00"])
def test_a_file_of_something_else_is_replaced(content):
    fastmlp.set_cpu_gemm("auto")
    path = cache.choices_path()
    path.parent.mkdir()
    path.write_text(content)
    run()
    found = json.loads(path.read_text())
    assert sorted(max(found.values(), key=len).values()) == sorted(choose.choices().values())


@needs_onednn
def test_a_cache_that_cannot_be_written(tmp_path):
    fastmlp.set_cpu_gemm("auto")
    (tmp_path / "cache").write_text("not a folder")
    run()
    assert choose.choices()
    assert (tmp_path / "cache").read_text() == "not a folder"


@pytest.mark.parametrize("why", ["float64", "mode", "deterministic", "no oneDNN"])
def test_aten_without_a_measurement(monkeypatch, why):
    if why == "mode":
        fastmlp.set_cpu_gemm("aten")
    elif why == "deterministic":
        torch.use_deterministic_algorithms(True)
    elif why == "no oneDNN":
        monkeypatch.setattr(onednn, "available", lambda: False)
    try:
        run(torch.float64 if why == "float64" else torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)
    assert choose.choices() == {}


def one_step(dtype: torch.dtype = torch.float32, *, epoch: bool = False, uint8: bool = False, **settings):
    """A function that takes a step, or with ``epoch`` the three steps of an epoch, the last with fewer rows."""
    loss = settings.get("loss", "cross_entropy")
    x, y = problem(SIZES, 40, uint8=uint8, loss=loss)
    x, y = for_step(x, y, dtype)
    model = converted(network(SIZES, settings.pop("activation", "sigmoid")), dtype)
    step = fastmlp.TrainStep(model, **{"lr": 0.1, **settings})
    if not epoch:
        return lambda: step(x, y)
    order, losses = torch.randperm(40), torch.zeros(3, dtype=dtype)
    lrs = torch.full((3,), 0.1, dtype=torch.float64)
    return lambda: step._engine.epoch(x, y, 16, order, lrs, losses)


def test_allocations_are_seen():
    kept = []
    assert allocations(lambda: kept.append(torch.empty(1000)), steps=3) == [4000, 4000, 4000]
    seen = allocations(lambda: torch.rand(1000).add_(1.0) * 2)
    assert max(seen) >= 4000
    assert sum(seen) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_step_allocates_nothing(name, dtype):
    fastmlp.set_cpu_gemm("aten")
    assert allocations(one_step(dtype, **OPTIMIZERS[name])) == []


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_a_step_allocates_nothing_with_any_activation(activation, optimizer):
    fastmlp.set_cpu_gemm("aten")
    assert allocations(one_step(activation=activation, **OPTIMIZERS[optimizer])) == []


@pytest.mark.parametrize("loss", STEP_LOSSES)
@pytest.mark.parametrize("epoch", [False, True], ids=["step", "epoch"])
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_a_step_allocates_nothing_with_any_loss_and_input(uint8, epoch, loss):
    fastmlp.set_cpu_gemm("aten")
    assert allocations(one_step(loss=loss, epoch=epoch, uint8=uint8)) == []


@needs_onednn
@pytest.mark.parametrize("name", ["sgd", "nesterov", "adamw"])
@pytest.mark.parametrize("epoch", [False, True], ids=["step", "epoch"])
def test_with_onednn_nothing_is_left_allocated(name, epoch):
    """oneDNN's results are new tensors; each is released when the next step has its own result."""
    fastmlp.set_cpu_gemm("onednn")
    step = one_step(epoch=epoch, **OPTIMIZERS[name])
    seen = allocations(step)
    assert max(seen) > 0
    assert sum(seen) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("mode", "native"),
    [("aten", True), ("aten", False), ("auto", False), ("auto", None)],
    ids=["aten, 16-bit products", "aten, by way of float32", "auto, by way of float32", "auto, as the processor does"],
)
def test_in_16_bits_nothing_is_left_allocated(monkeypatch, mode, native, dtype):
    """Torch's 16-bit libraries use scratch memory inside their products, and so does a sum in float32."""
    if native is not None:
        have_16_bit_products(monkeypatch, native)
    fastmlp.set_cpu_gemm(mode)
    step = one_step(dtype, momentum=0.9)
    assert sum(allocations(step)) == 0


def test_choices_of_another_process_hold(tmp_path, monkeypatch):
    """A run that goes on on another machine of the kind has the choices of its beginning."""
    monkeypatch.setattr(choose.onednn, "available", lambda: True)
    monkeypatch.setattr(choose, "_fastest", lambda trials: "onednn")
    arguments = ("linear", 64, 784, 512, torch.float32, lambda rows: {})
    assert choose.choose(*arguments) == "onednn"
    ((name, choice),) = choose.named_choices().items()
    assert choice == "onednn"
    new_process(monkeypatch)
    monkeypatch.setattr(cache, "choices_path", lambda: tmp_path / "another machine")
    monkeypatch.setattr(choose, "_fastest", lambda trials: "aten")
    choose.adopt_choices({name: "onednn"})
    assert choose.choose(*arguments) == "onednn"
    assert choose.named_choices() == {name: "onednn"}
