"""TrainStep's CUDA graphs on the simulated GPU give the bits of plain launches, whatever changes between the steps.

``tests.support.cuda_graph`` describes captures and replays on the simulated GPU. Between two replays only the tensors
that are declared a step's state keep their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import fastmlp
from fastmlp import TrainStep
from fastmlp.base.losses import STEP_LOSSES, takes_classes
from fastmlp.step import graphs, triton_launches
from tests.conftest import INTERPRETING

if INTERPRETING:
    pytest.skip("the simulated GPU runs compiled kernels", allow_module_level=True)

from tests.support.cuda_graph import SimulatedCuda
from tests.support.precision import default_precision, set_matmul  # noqa: F401  a fixture

pytestmark = pytest.mark.execute

#: No size is a multiple of 16, so that layers share their compiled kernels.
SIZES = (20, 18, 5)
ROWS = 12

Script = Callable[[TrainStep], Iterator[Tensor]]

SETTINGS = {
    "sgd": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "clipped": {"lr": 0.1, "max_grad_norm": 0.05},
    "average": {"lr": 0.1, "momentum": 0.9, "ema_decay": 0.9, "ema_warmup": True},
}
#: Values of settings in turn. No setting turns a rule into another one, whose steps are another graph.
CHANGES: dict[str, dict[str, list]] = {
    "sgd": {"lr": [0.1, 0.05], "weight_decay": [0.0, 0.01, 0.1]},
    "nesterov": {"lr": [0.1, 0.05], "momentum": [0.9, 0.5, 0.99], "weight_decay": [0.01, 0.0]},
    "adamw": {
        "lr": [0.01, 0.02],
        "betas": [(0.9, 0.999), (0.5, 0.9), (0.9, 0.99)],
        "eps": [1e-8, 1e-3],
        "weight_decay": [0.1, 0.0],
    },
    "clipped": {"lr": [0.1], "max_grad_norm": [0.05, 0.01, 10.0]},
    "average": {"lr": [0.1, 0.05], "ema_decay": [0.9, 0.5, 0.05]},
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
    if takes_classes(STEP_LOSSES[loss]):
        return x, torch.randint(0, SIZES[-1], (rows,), generator=g)
    return x, torch.rand(rows, SIZES[-1], generator=g)


def permuted(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def run(
    script: Script,
    *,
    cuda_graph: bool,
    sizes: tuple[int, ...] = SIZES,
    precision: tuple[torch.dtype, torch.dtype | None] = (torch.float32, None),
    frozen: tuple[int, ...] = (),
    execute: bool = True,
    dropout: float = 0.0,
    **settings,
) -> tuple[list[Tensor], SimulatedCuda]:
    """(results, GPU). The results are the script's tensors, followed by the parameters and the state."""
    torch.manual_seed(0)
    with SimulatedCuda(execute=execute) as cuda:
        model = fastmlp.MLP(sizes, "relu", dtype=precision[0], dropout=dropout)
        for layer in frozen:
            model.layers[layer].requires_grad_(False)
        step = cuda.keep_state(TrainStep(model, dtype=precision[1], cuda_graph=cuda_graph, **settings))
        results = [t.clone() for t in script(step)]
        results += [t.clone() for t in model.buffers()]
        results += [p.detach().clone() for p in model.parameters()] + list(step.state_dict().values())
    return results, cuda


def check(script: Script, *, replays: int, **settings) -> tuple[list[Tensor], SimulatedCuda]:
    """Run the same script with plain launches and with graphs, which must be replayed at least ``replays`` times."""
    expected, plain = run(script, cuda_graph=False, **settings)
    actual, cuda = run(script, cuda_graph=True, **settings)
    assert plain.captures == []
    assert cuda.replays >= replays
    assert len(actual) == len(expected)
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m, i=i: f"result {i}: {m}")
    assert all(t.isfinite().all() for t in expected[-2 * len(SIZES) + 2 :]), "NaN everywhere shows nothing"
    return actual, cuda


def steps(count: int, **options) -> Script:
    def script(step: TrainStep) -> Iterator[Tensor]:
        for i in range(count):
            yield step(*batch(i, **options))

    return script


def epochs(count: int, rows: int = 2 * ROWS, **options) -> Script:
    """Epochs over one data set, each in another order."""

    def script(step: TrainStep) -> Iterator[Tensor]:
        images, labels = batch(0, rows, **options)
        for epoch in range(count):
            yield step.epoch(images, labels, ROWS, permuted(rows, epoch))
            yield step.losses

    return script


def both(count: int, **options) -> Script:
    """Steps, followed by epochs."""

    def script(step: TrainStep) -> Iterator[Tensor]:
        yield from steps(count, **options)(step)
        yield from epochs(count, **options)(step)

    return script


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_steps(settings):
    """Every step gets new tensors."""
    _, cuda = check(steps(4), replays=3, sizes=(20, 18, 17, 5), **settings)
    assert len(cuda.captures) == 1
    assert set(cuda.capture_modes) == {"thread_local"}, "other threads may allocate meanwhile"


@pytest.mark.parametrize("optimizer", ["momentum", "adamw", "clipped"])
def test_epochs(optimizer):
    """Two full batches and a short one."""
    _, cuda = check(epochs(3, 2 * ROWS + 5, pixels=True), replays=4, **SETTINGS[optimizer])
    assert len(cuda.captures) == 2


def test_dropout():
    """Every replay drops what the plain step with the same number drops, and no two drop the same."""
    _, cuda = check(both(3), replays=4, dropout=0.5, **SETTINGS["sgd"])
    assert len(cuda.captures) == 2

    def script(step: TrainStep) -> Iterator[Tensor]:
        for _ in range(4):
            yield step(*batch(0))

    losses, cuda = run(script, cuda_graph=True, dropout=0.5, **{**SETTINGS["sgd"], "lr": 0.0})
    assert cuda.replays == 3
    assert len({float(loss) for loss in losses[:4]}) == 4


def test_dropout_is_switched_off_and_on():
    """Each mode has a graph; the step without dropout has no number."""

    def script(step: TrainStep) -> Iterator[Tensor]:
        for i in range(6):
            step.model.train(i % 2 == 0)
            yield step(*batch(i))
        assert step.model.dropout_state[1] == 3

    _, cuda = check(script, replays=4, dropout=0.5, **SETTINGS["sgd"])
    assert len(cuda.captures) == 2


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_16_bits(precision):
    check(both(3), replays=4, precision=precision, **SETTINGS["nesterov"])


@pytest.mark.parametrize("loss", ["mse", "softmax_squared_error"])
def test_losses_whose_targets_are_gathered_outside_the_kernels(loss):
    check(both(3, loss=loss), replays=4, loss=loss, lr=0.1)


def weighted(count: int, **options) -> Script:
    """Steps and epochs with new sample weights every time, and one without."""

    def script(step: TrainStep) -> Iterator[Tensor]:
        images, labels = batch(0, 2 * ROWS, **options)
        weights = torch.rand(2 * ROWS, generator=torch.Generator().manual_seed(9))
        for i in range(count):
            x, y = batch(i, **options)
            yield step(x, y, torch.rand(ROWS, generator=torch.Generator().manual_seed(i)).double())
            yield step(x, y)
            weights.mul_(0.5)
            weights[i] = 2.0
            yield step.epoch(images, labels, ROWS, permuted(2 * ROWS, i), sample_weight=weights)

    return script


def test_sample_weights():
    """Their values are those of each call, not those of the capture."""
    options = {"class_weight": torch.tensor([0.5, 2.0, 0.25, 1.0, 3.0]), "label_smoothing": 0.1}
    _, cuda = check(weighted(4), replays=6, **options, **SETTINGS["momentum"])
    assert len(cuda.captures) == 3


def test_sample_weights_and_float16():
    precision = PRECISIONS["mixed float16"]
    check(weighted(3, loss="mse"), replays=4, loss="huber", precision=precision, **SETTINGS["sgd"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_learning_rate_changes(optimizer):
    def script(step: TrainStep) -> Iterator[Tensor]:
        for i in range(4):
            step.lr = 0.1 / (i + 1)
            yield step(*batch(i))
        images, labels = batch(0, 2 * ROWS)
        for factors in ([1.0, 0.5], [0.0, 2.0], [3.0, 1.0]):
            step.lr *= 0.7
            yield step.epoch(images, labels, ROWS, lr_factors=factors)

    check(script, replays=5, **{**SETTINGS[optimizer], "lr": 1.0})


@pytest.mark.parametrize("optimizer", CHANGES)
def test_settings_change_without_a_new_capture(optimizer):
    """A step has one graph, and an epoch has one, whatever the settings are."""

    def script(step: TrainStep) -> Iterator[Tensor]:
        images, labels = batch(0, ROWS)
        for i in range(4):
            values = {name: values[i % len(values)] for name, values in CHANGES[optimizer].items()}
            step.optimizer.param_groups[0].update(values)
            yield step(*batch(i))
            yield step.epoch(images, labels, ROWS)

    start = {name: values[0] for name, values in CHANGES[optimizer].items()}
    _, cuda = check(script, replays=6, **{**SETTINGS[optimizer], **start})
    assert len(cuda.captures) == 2


@pytest.mark.parametrize("settings", [{"momentum": 0.5}, {"optimizer": "adamw", "max_grad_norm": 0.05}], ids=str)
def test_settings_of_groups_change_without_a_new_capture(settings):
    def script(step: TrainStep) -> Iterator[Tensor]:
        images, labels = batch(0, ROWS)
        for i in range(3):
            for j, group in enumerate(step.optimizer.param_groups):
                group.update(lr=0.1 / (i + 3 * j + 1), weight_decay=0.1 * ((i + j) % 2))
            yield step(*batch(i))
            yield step.epoch(images, labels, ROWS)

    groups = [{"params": "*.bias", "lr": 0.5}]
    _, cuda = check(script, replays=4, lr=0.1, param_groups=groups, **settings)
    assert len(cuda.captures) == 2


@pytest.mark.usefixtures("default_precision")
def test_the_precision_of_float32_products_changes():
    def script(step: TrainStep) -> Iterator[Tensor]:
        for precision in ("ieee", "tf32", "ieee"):
            set_matmul(precision)
            yield from steps(3)(step)

    _, cuda = check(script, replays=7, **SETTINGS["sgd"])
    assert len(cuda.captures) == 2


def test_adamw_counts_every_step_however_it_is_taken():
    """AdamW's corrections for the first steps differ by large factors from one step to the next."""

    def script(step: TrainStep) -> Iterator[Tensor]:
        images, labels = batch(9, 2 * ROWS)
        for i in range(3):
            yield step(*batch(i))
            yield step.epoch(images, labels, ROWS)
            step.gradients(*batch(20 + i))
            step.update()
        assert step.state_dict()["step"].item() == 3 * 4

    check(script, replays=4, **SETTINGS["adamw"])


@pytest.mark.parametrize("pixels", [False, True], ids=["float", "pixels"])
def test_data_and_labels_change_in_place(pixels):
    def script(step: TrainStep) -> Iterator[Tensor]:
        x, y = batch(0, pixels=pixels)
        images, labels = batch(1, 2 * ROWS, pixels=pixels)
        for i in range(2, 5):
            yield step(x, y)
            yield step.epoch(images, labels, ROWS)
            for old, new in zip((x, y), batch(i, pixels=pixels), strict=True):
                old.copy_(new)
            for old, new in zip((images, labels), batch(10 + i, 2 * ROWS, pixels=pixels), strict=True):
                old.copy_(new)

    check(script, replays=4, **SETTINGS["sgd"])


def test_tensors_of_other_strides():
    def script(step: TrainStep) -> Iterator[Tensor]:
        for i in range(4):
            x, y = batch(i, 2 * ROWS)
            yield step(*((x[::2], y[::2]) if i % 2 else (x[:ROWS].t().contiguous().t(), y[:ROWS])))

    check(script, replays=2, **SETTINGS["sgd"])


def test_data_sets_come_and_go():
    def script(step: TrainStep) -> Iterator[Tensor]:
        lasting = batch(0, 2 * ROWS)
        for i in range(1, 4):
            yield step.epoch(*lasting, ROWS)
            passing = batch(i, 2 * ROWS)
            for _ in range(2):
                yield step.epoch(*passing, ROWS)
            del passing

    check(script, replays=4, **SETTINGS["sgd"])


def test_a_graph_that_was_given_up_is_captured_again(monkeypatch):
    """Three sizes, each often enough to be captured, where two graphs are kept. Then the first size comes once more."""
    monkeypatch.setattr(graphs, "_KEPT", 2)
    monkeypatch.setattr(graphs, "_CALLS_PER_EVICTION", 3)

    def script(step: TrainStep) -> Iterator[Tensor]:
        for i, size in enumerate([17, 18, 19, 17]):
            for j in range(4):
                yield step(*batch(10 * i + j, size))

    _, cuda = check(script, replays=4 * 3, **SETTINGS["sgd"])
    assert len(cuda.captures) == 4


def test_a_graph_goes_with_the_buffers_that_it_uses(monkeypatch):
    """Three sizes, where the buffers of two sizes are kept."""
    monkeypatch.setattr(triton_launches, "_PLANS", 2)

    def script(step: TrainStep) -> Iterator[Tensor]:
        for i, size in enumerate([17, 17, 17, 18, 18, 17, 19, 19, 18, 17, 17]):
            yield step(*batch(i, size))

    _, cuda = check(script, replays=6, **SETTINGS["sgd"])
    assert len(cuda.captures) == 4


@pytest.mark.parametrize("kind", ["step", "epoch"])
def test_more_sizes_than_are_kept(kind):
    """Sixteen batch sizes have a graph each. Twenty sizes in rotation have no graph, instead of a capture per call."""

    def rotation(count: int) -> Script:
        def script(step: TrainStep) -> Iterator[Tensor]:
            for _ in range(4):
                for size in range(17, 17 + count):
                    x, y = batch(size, size)
                    yield step(x, y) if kind == "step" else step.epoch(data[size], labels[size], size)

        return script

    data, labels = ({size: batch(size, size)[i] for size in range(17, 37)} for i in (0, 1))
    _, few = run(rotation(16), cuda_graph=True, execute=False, **SETTINGS["sgd"])
    assert (len(few.captures), few.replays) == (16, 3 * 16)
    _, many = run(rotation(20), cuda_graph=True, execute=False, **SETTINGS["sgd"])
    assert len(many.captures) <= 4


def test_state_is_loaded_between_replays():
    def script(step: TrainStep) -> Iterator[Tensor]:
        yield from steps(2)(step)
        model_state, state = {k: v.clone() for k, v in step.model.state_dict().items()}, step.state_dict()
        for _ in range(2):
            yield from both(2)(step)
            step.model.load_state_dict(model_state)
            step.load_state_dict(state)
            yield from state.values()
        yield from steps(2)(step)

    check(script, replays=4, **SETTINGS["adamw"])
    check(script, replays=4, precision=PRECISIONS["mixed float16"], **SETTINGS["nesterov"])


@pytest.mark.parametrize("precision", [(torch.float32, None), *PRECISIONS.values()], ids=["float32", *PRECISIONS])
def test_parameters_change_in_place_between_replays(precision):
    def script(step: TrainStep) -> Iterator[Tensor]:
        images, labels = batch(0, 2 * ROWS)
        for i in range(3):
            yield step(*batch(i))
            with torch.no_grad():
                for p in step.model.parameters():
                    p.mul_(0.75)
            yield step.epoch(images, labels, ROWS)
            with torch.no_grad():
                step.model.layers[1].weight[3:7] = 0.25

    check(script, replays=4, precision=precision, **SETTINGS["nesterov"])


@pytest.mark.parametrize("optimizer", ["nesterov", "adamw"])
def test_float16_overflows_and_goes_on(optimizer):
    """Steps that overflow change nothing but the scale, also inside a graph."""

    def script(step: TrainStep) -> Iterator[Tensor]:
        for i, factor in enumerate([1.0, 1.0, 3e4, 1.0, 3e4, 3e4, 1.0]):
            x, y = batch(i)
            step(x * factor, y)  # its loss may be infinite
            yield step.model.layers[0].weight.detach()
            yield torch.tensor(list(step._engine.counters().values()))
        images, labels = batch(30, 2 * ROWS)
        images[::5] *= 3e4
        for i in range(3):
            step.epoch(images, labels, ROWS, permuted(2 * ROWS, i))
            yield step.model.layers[0].weight.detach()

    results, _ = check(script, replays=8, precision=PRECISIONS["mixed float16"], **SETTINGS[optimizer])
    weights, counters = results[:14:2], results[1:14:2]
    scales = [t[-2].item() for t in counters]
    assert scales[:2] == [scales[0]] * 2
    assert [scale / scales[0] for scale in scales] == [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 8, 1 / 8]
    same = [torch.equal(a, b) for a, b in pairwise(weights)]
    assert same == [False, True, False, True, True, False]
    if optimizer == "adamw":
        assert [t[0].item() for t in counters] == [1, 2, 2, 3, 3, 3, 4], "a skipped step does not count"


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_layers(frozen):
    check(both(3), replays=4, frozen=(frozen,), **SETTINGS["sgd"])


def test_gradients_and_updates_between_replays():
    def script(step: TrainStep) -> Iterator[Tensor]:
        for i in range(3):
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
            args[5].item()  # the loss

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
    _, cuda = run(steps(20), cuda_graph=True, sizes=(20, 18, 17, 5), execute=False, **SETTINGS["sgd"])
    assert cuda.captures == [5]
    assert cuda.replays >= 18
    assert len(cuda.launched) <= 10


def test_an_epoch_is_one_replay_for_512_steps():
    def script(step: TrainStep) -> Iterator[Tensor]:
        images, labels = batch(0, 600 * 2 + 1)
        for _ in range(4):
            yield step.epoch(images, labels, 2)

    _, cuda = run(script, cuda_graph=True, execute=False, **SETTINGS["sgd"])
    assert sorted(cuda.captures) == [3, 3 * 88, 3 * 512]
    assert cuda.replays >= 3 * 3
