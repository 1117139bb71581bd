"""TrainStep's CUDA graphs on the simulated GPU: bit for bit what plain launches give, whatever changes in between.

``tests.cuda_graph`` says what a capture and a replay are there: only what is declared a step's state outlasts the time
between two replays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp import TrainStep, step_graph
from tests.conftest import INTERPRETING

if INTERPRETING:
    pytest.skip("the simulated GPU runs compiled kernels", allow_module_level=True)

from tests.cuda_graph import SimulatedCuda

pytestmark = pytest.mark.execute

#: No number is a multiple of 16, so that layers share their compiled kernels.
SIZES = (20, 18, 17, 5)
ROWS = 12

Script = Callable[[TrainStep], Iterator[Tensor]]

SETTINGS = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "clipped": {"lr": 0.1, "max_grad_norm": 0.05},
}
#: dtypes of parameters and products.
PRECISIONS = {
    "mixed float16": (torch.float32, torch.float16),
    "float16": (torch.float16, None),
    "mixed bfloat16": (torch.float32, torch.bfloat16),
}


def batch(seed: int, rows: int = ROWS, *, pixels: bool = False, loss: str = "cross_entropy") -> tuple[Tensor, Tensor]:
    """New tensors at every call."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (rows, SIZES[0]), generator=g, dtype=torch.uint8)
    x = x if pixels else torch.randn(rows, SIZES[0], generator=g)
    if loss in ("cross_entropy", "softmax_squared_error"):
        return x, torch.randint(0, SIZES[-1], (rows,), generator=g)
    return x, torch.rand(rows, SIZES[-1], generator=g)


def permuted(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def run(
    script: Script,
    *,
    cuda_graph: bool,
    precision: tuple[torch.dtype, torch.dtype | None] = (torch.float32, None),
    frozen: tuple[int, ...] = (),
    execute: bool = True,
    **settings,
) -> tuple[list[Tensor], SimulatedCuda]:
    """What the script yields, then parameters and state; and the GPU."""
    torch.manual_seed(0)
    with SimulatedCuda(execute=execute) as cuda:
        model = fastmlp.MLP(SIZES, "relu", dtype=precision[0])
        for layer in frozen:
            model.layers[layer].requires_grad_(False)
        step = cuda.keep_state(TrainStep(model, dtype=precision[1], cuda_graph=cuda_graph, **settings))
        results = [t.clone() for t in script(step)]
        results += [p.detach().clone() for p in model.parameters()] + list(step.state_dict().values())
    return results, cuda


def check(script: Script, *, replays: int, **settings) -> SimulatedCuda:
    """The same script with graphs, of which so many are replayed at least, and with plain launches."""
    expected, plain = run(script, cuda_graph=False, **settings)
    actual, cuda = run(script, cuda_graph=True, **settings)
    assert plain.captures == []
    assert cuda.replays >= replays
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"result {i}: {m}")
    assert all(t.isfinite().all() for t in expected[-len(SIZES) * 2 :]), "nothing is shown by numbers that are all NaN"
    return cuda


def steps(count: int, **options) -> Script:
    def script(step: TrainStep) -> Iterator[Tensor]:
        for i in range(count):
            yield step(*batch(i, **options))

    return script


def epochs(count: int, **options) -> Script:
    """Over one data set: two full batches and a short one, in another order each time."""

    def script(step: TrainStep) -> Iterator[Tensor]:
        images, labels = batch(0, 2 * ROWS + 5, **options)
        for epoch in range(count):
            yield step.epoch(images, labels, ROWS, permuted(len(images), epoch))
            yield step.losses

    return script


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_steps(settings):
    """Every step has tensors of its own."""
    cuda = check(steps(4), replays=2, **settings)
    assert len(cuda.captures) == 1
    assert set(cuda.capture_modes) == {"thread_local"}, "other threads may allocate meanwhile"


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_epochs(settings):
    check(epochs(3, pixels=True), replays=3, **settings)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_16_bits(optimizer, precision):
    def script(step: TrainStep) -> Iterator[Tensor]:
        yield from steps(4)(step)
        yield from epochs(3)(step)

    check(script, replays=4, precision=precision, **SETTINGS[optimizer])


@pytest.mark.parametrize("loss", ["mse", "l1", "bce", "softmax_squared_error"])
def test_losses_whose_targets_are_gathered_outside_the_kernels(loss):
    def script(step: TrainStep) -> Iterator[Tensor]:
        yield from steps(3, loss=loss)(step)
        yield from epochs(3, loss=loss)(step)

    check(script, replays=3, loss=loss, lr=0.1)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_learning_rate_changes(optimizer):
    def script(step: TrainStep) -> Iterator[Tensor]:
        for i in range(5):
            step.lr = 0.1 / (i + 1)
            yield step(*batch(i))
        images, labels = batch(0, 2 * ROWS)
        for factors in ([1.0, 0.5], [0.25, 0.125], [0.0, 2.0], [3.0, 1.0]):
            step.lr *= 0.7
            yield step.epoch(images, labels, ROWS, lr_factors=factors)

    check(script, replays=5, **{**SETTINGS[optimizer], "lr": 1.0})


def test_adamw_counts_every_step_however_it_is_taken():
    """Its corrections for the first steps differ by factors from one step to the next."""

    def script(step: TrainStep) -> Iterator[Tensor]:
        images, labels = batch(9, 2 * ROWS + 5)
        for i in range(4):
            yield step(*batch(i))
            yield step.epoch(images, labels, ROWS)
            step.gradients(*batch(20 + i))
            step.update()
        assert step.state_dict()["step"].item() == 4 * 5

    check(script, replays=4, **SETTINGS["adamw"])


@pytest.mark.parametrize("pixels", [False, True], ids=["float", "pixels"])
def test_data_and_labels_change_in_place(pixels):
    def script(step: TrainStep) -> Iterator[Tensor]:
        x, y = batch(0, pixels=pixels)
        images, labels = batch(1, 2 * ROWS, pixels=pixels)
        for i in range(2, 6):
            yield step(x, y)
            yield step.epoch(images, labels, ROWS)
            for old, new in zip((x, y), batch(i, pixels=pixels), strict=True):
                old.copy_(new)
            for old, new in zip((images, labels), batch(10 + i, 2 * ROWS, pixels=pixels), strict=True):
                old.copy_(new)

    check(script, replays=4, **SETTINGS["sgd"])


def test_tensors_of_other_strides():
    def script(step: TrainStep) -> Iterator[Tensor]:
        for i in range(6):
            x, y = batch(i, 2 * ROWS)
            yield step(*((x[::2], y[::2]) if i % 2 else (x[:ROWS].t().contiguous().t(), y[:ROWS])))

    check(script, replays=2, **SETTINGS["sgd"])


def test_data_sets_come_and_go():
    def script(step: TrainStep) -> Iterator[Tensor]:
        lasting = batch(0, 2 * ROWS)
        for i in range(1, 4):
            yield step.epoch(*lasting, ROWS)
            passing = batch(i, 2 * ROWS)
            for _ in range(3):
                yield step.epoch(*passing, ROWS)
            del passing

    check(script, replays=4, **SETTINGS["sgd"])


@pytest.mark.parametrize("kind", ["step", "epoch"])
def test_more_sizes_than_graphs_are_kept(kind):
    """Twenty batch sizes in rotation are launched plainly; then two of them come often enough for a graph."""
    sizes = [size for size in range(17, 39) if size % 16][:20]
    data = {size: batch(size, size) for size in sizes}

    def script(step: TrainStep) -> Iterator[Tensor]:
        for i, size in enumerate([*sizes * 2, *[20] * 3, *[sizes[0]] * 3]):
            x, y = data[size]
            yield step(x + i / 64, y) if kind == "step" else step.epoch(x, y, size, permuted(size, i))

    cuda = check(script, replays=4, **SETTINGS["sgd"])
    assert len(cuda.captures) == 2, "sizes that keep changing are captured over and over again"


def test_fewer_sizes_than_graphs_are_kept_have_one_each():
    """Two batch sizes for each of eight sizes of steps, in rotation."""
    data = {size: batch(size, size) for size in range(17, 25)}

    def script(step: TrainStep) -> Iterator[Tensor]:
        for _ in range(3):
            for size, (x, y) in data.items():
                yield step(x, y)
                yield step.epoch(x, y, size)

    cuda = check(script, replays=2 * 16, **SETTINGS["sgd"])
    assert len(cuda.captures) == 16


def test_a_graph_that_was_given_up_is_captured_again(monkeypatch):
    """Four sizes where three are kept, each often enough to be captured, and the first one once more."""
    monkeypatch.setattr(step_graph, "_KEPT", 3)
    monkeypatch.setattr(step_graph, "_CALLS_PER_EVICTION", 4)

    def script(step: TrainStep) -> Iterator[Tensor]:
        for i, size in enumerate([17, 18, 19, 20, 17, 20]):
            for j in range(6):
                yield step(*batch(10 * i + j, size))

    cuda = check(script, replays=6 * 5 - 8, **SETTINGS["sgd"])
    assert len(cuda.captures) == 5


def test_state_is_loaded_between_replays():
    def script(step: TrainStep) -> Iterator[Tensor]:
        yield from steps(3)(step)
        model_state, state = {k: v.clone() for k, v in step.model.state_dict().items()}, step.state_dict()
        for _round in range(2):
            yield from steps(2)(step)
            yield from epochs(2)(step)
            step.model.load_state_dict(model_state)
            step.load_state_dict(state)
            yield from state.values()
        yield from steps(2)(step)

    for optimizer in ("nesterov", "adamw"):
        check(script, replays=4, **SETTINGS[optimizer])
    check(script, replays=4, precision=PRECISIONS["mixed float16"], **SETTINGS["adamw"])


@pytest.mark.parametrize("precision", [(torch.float32, None), *PRECISIONS.values()], ids=["float32", *PRECISIONS])
def test_parameters_change_in_place_between_replays(precision):
    def script(step: TrainStep) -> Iterator[Tensor]:
        for i in range(4):
            yield step(*batch(i))
            with torch.no_grad():
                for p in step.model.parameters():
                    p.mul_(0.75)
        images, labels = batch(0, 2 * ROWS)
        for _ in range(4):
            yield step.epoch(images, labels, ROWS)
            with torch.no_grad():
                step.model.layers[1].weight[3:7] = 0.25

    check(script, replays=4, precision=precision, **SETTINGS["nesterov"])


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_float16_overflows_and_goes_on(optimizer):
    """Steps that overflow change nothing but the scale, also inside a graph."""

    def script(step: TrainStep) -> Iterator[Tensor]:
        for i, factor in zip(range(7), cycle([1.0, 1.0, 3e4]), strict=False):
            x, y = batch(i)
            step(x * factor, y)  # its loss may be infinite
            yield from (p.detach() for p in step.model.parameters())
            yield torch.tensor(list(step._engine.counters().values()))
        images, labels = batch(30, 2 * ROWS)
        images[::5] *= 3e4
        for i in range(3):
            step.epoch(images, labels, ROWS, permuted(2 * ROWS, i))

    precision = PRECISIONS["mixed float16"]
    start = fastmlp.MLP(SIZES, "relu")
    check(script, replays=4, precision=precision, **SETTINGS[optimizer])
    results, _ = run(script, cuda_graph=True, precision=precision, **SETTINGS[optimizer])
    before, after = results[8 * len(start.layers) :], results
    assert before is not after
    scales = results[len(list(start.parameters())) :: len(list(start.parameters())) + 1][:7]
    names = ["step"] if optimizer == "adamw" else []
    scale = [t[len(names)].item() for t in scales]
    assert scale[1] == 2 * scale[2] == 2 * scale[4] == 4 * scale[5]
    if optimizer == "adamw":
        assert [t[0].item() for t in scales] == [1, 2, 2, 3, 4, 4, 5], "a skipped step does not count"


@pytest.mark.parametrize("frozen", [(0,), (2,), (0, 2)], ids=str)
def test_frozen_layers(frozen):
    def script(step: TrainStep) -> Iterator[Tensor]:
        yield from steps(3)(step)
        yield from epochs(2)(step)

    check(script, replays=2, frozen=frozen, **SETTINGS["sgd"])


def test_gradients_and_updates_between_replays():
    def script(step: TrainStep) -> Iterator[Tensor]:
        for i in range(4):
            yield step(*batch(i))
            step.gradients(*batch(10 + i))
            yield from step.gradients(*batch(20 + i), accumulate=True).values()
            step.update()

    for settings in ("nesterov", "clipped"):
        check(script, replays=2, **SETTINGS[settings])


@pytest.mark.parametrize("kind", ["step", "epoch"])
def test_inside_a_capture_of_the_caller_the_advice_is_given(kind):
    x, y = batch(0)
    with SimulatedCuda() as cuda:
        step = cuda.keep_state(TrainStep(fastmlp.MLP(SIZES, "relu"), lr=0.1))
        take = (lambda: step(x, y)) if kind == "step" else (lambda: step.epoch(x, y, ROWS))
        for _ in range(3):
            take()
        advice = r"graphs do not nest; build the step with TrainStep\(\.\.\., cuda_graph=False\)"
        with pytest.raises(RuntimeError, match=advice), torch.cuda.graph(torch.cuda.CUDAGraph()):
            take()
        take()


def test_what_the_caller_captures_without_graphs_trains():
    """The documented way: TrainStep(..., cuda_graph=False) inside a graph of the caller's."""

    def trained(*, captured: bool) -> list[Tensor]:
        torch.manual_seed(0)
        with SimulatedCuda() as cuda:
            model = fastmlp.MLP(SIZES, "relu")
            step = cuda.keep_state(TrainStep(model, cuda_graph=False, **SETTINGS["nesterov"]))
            x, y = batch(0)
            step(x, y)
            if captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step(x, y)
            for i in range(1, 4):
                for old, new in zip((x, y), batch(i), strict=True):
                    old.copy_(new)
                graph.replay() if captured else step(x, y)
        return [p.detach() for p in model.parameters()]

    for a, b in zip(trained(captured=True), trained(captured=False), strict=True):
        assert torch.equal(a, b)


def test_a_failed_capture_gives_advice_and_does_no_harm(monkeypatch):
    x, y = batch(0)
    with SimulatedCuda() as cuda:
        step = cuda.keep_state(TrainStep(fastmlp.MLP(SIZES, "relu"), lr=0.1))
        launch = step._engine._launch

        def waits(*args):
            launch(*args)
            args[-1].item()

        step(x, y)
        with monkeypatch.context() as patch:
            patch.setattr(step._engine, "_launch", waits)
            with pytest.raises(RuntimeError, match=r"could not be captured.*cuda_graph=False"):
                [step(x, y) for _ in range(2)]
        replays = cuda.replays
        for _ in range(3):
            assert step(x, y).isfinite()
        assert cuda.replays > replays


def test_a_step_is_one_replay_of_five_launches():
    """The launches of plain steps and the nodes of graphs, counted on the recording driver."""
    _, cuda = run(steps(20), cuda_graph=True, execute=False, **SETTINGS["sgd"])
    assert cuda.captures == [5]
    assert cuda.replays >= 18
    assert len(cuda.launched) <= 10


def test_an_epoch_is_one_replay_for_512_steps():
    def script(step: TrainStep) -> Iterator[Tensor]:
        images, labels = batch(0, 600 * 2 + 1)
        for _ in range(4):
            yield step.epoch(images, labels, 2)

    _, cuda = run(script, cuda_graph=True, execute=False, **SETTINGS["sgd"])
    assert sorted(cuda.captures) == [5, 5 * 88, 5 * 512]
    assert cuda.replays >= 3 * 3
