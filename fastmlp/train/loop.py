"""Training of a model on data that lives on the device.

The data set is two tensors on the model's device, images as uint8, and is never copied as a whole. An epoch is a
permutation of the row numbers from a seeded generator, and each step gathers its rows. The loss accumulates on the
device. The host reads the loss every `CHECK_EVERY` steps and then finds a loss that is not finite.

An engine of `fastmlp.train.engines` runs a stretch of steps, `fastmlp.train.scores` judges the model, and `fit` does
everything else.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..base.names import unknown
from ..cpu import adopt_choices, named_choices
from ..nn import MLP
from ..step.groups import by_names
from .engines import ENGINES, Engine, check_shares, checked_rule, engine_for, step_options, usual_rule
from .ignored import mean_of_counted, rows_that_count
from .results import EXPLODED, DivergenceError, EpochResult, History, Progress
from .schedules import Schedule, lr_factor
from .scores import LabeledImages, Samples, checked, evaluate, loss_of_a_guess, metric_of, tensors
from .split import held_out
from .state import RunState, fingerprint, load_state, save_state
from .weights import checked_weights, of_rows

__all__ = ["CHECK_EVERY", "DivergenceError", "EpochResult", "History", "LabeledImages", "Progress", "evaluate", "fit"]

CHECK_EVERY = 100
"""Steps between two readings of the loss by the host, each of which waits for the device."""

_GUESS_ROWS = 2048


def fit(
    model: nn.Module,
    train: Samples,
    test: Samples | None = None,
    *,
    validation: Samples | float | None = None,
    sample_weight: Tensor | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    optimizer: str = "sgd",
    lr: float,
    loss: str = "cross_entropy",
    momentum: float | None = None,
    weight_decay: float | None = None,
    nesterov: bool | None = None,
    schedule: str | Schedule = "linear",
    warmup: float = 0.05,
    seed: int = 0,
    engine: str | Engine = "auto",
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | Callable[[RunState], object] | None = None,
    resume: str | os.PathLike[str] | RunState | None = None,
    on_epoch: Callable[[EpochResult], object] | None = None,
    on_progress: Callable[[Progress], object] | None = None,
    **settings: Any,
) -> History:
    """Train ``model`` in place and evaluate it after every epoch; dropout drops in the training only.

        model = fastmlp.MLP([20, 64, 3])
        history = fastmlp.fit(model, (x, y), validation=0.1, test=(x_test, y_test), lr=0.1, epochs=20)
        history.best.test_accuracy

    The same seed, model and data give the same run. The order of the rows comes from a generator of the CPU that only
    `fit` uses, so the order is the same on every device, and global random state is not touched.

    With ``validation``, every epoch is evaluated on the validation data. At the end, the model gets the parameters of
    the epoch with the least validation loss, and the test data is looked at once, with these parameters. Without
    ``validation``, every epoch is evaluated on the test data, and the model keeps the parameters of the last epoch.

    With ``ema_decay=0.999``, the moving average of the parameters is what is evaluated and what the model gets at the
    end, with ``validation`` the average of the best epoch.

    With ``checkpoint``, the state of the run is written after every epoch, to one file that changes as a whole. A run
    that was killed goes on from its last finished epoch, and gives the parameters and the history of the run that was
    never stopped, bit for bit:

        fastmlp.fit(model, (x, y), lr=0.1, checkpoint="run.state")
        fastmlp.fit(model, (x, y), lr=0.1, checkpoint="run.state", resume="run.state")

    Data is a pair of tensors (x, y), or a data set with ``images`` and ``labels`` (`fastmlp.ImageDataset`), with ``x``
    and ``y`` (`fastmlp.data.Table`), or with two ``tensors`` (torch.utils.data.TensorDataset), on the model's device.
    Inputs [N, features] or [N, ...] are uint8 pixels or of the model's dtype. Targets are class numbers int64 [N], or
    floating-point values [N, outputs] or, for one output, [N], as the loss takes.

    Args:
        model: maps inputs [B, features] to outputs [B, C]; on the device of the data.
        train: training data, at least one row; the last batch of an epoch may be smaller.
        test: data to evaluate on; default: none.
        validation: data that chooses the best epoch, or the share of the training rows to hold out for this, drawn
            with ``seed`` and from all classes alike; default: none.
        sample_weight: [N] floating-point, above 0: a weight s of each row of ``train``. A step then takes sum(s l) /
            sum(s) of its rows' losses l, as `TrainStep`. Evaluations, and rows that ``validation`` holds out, have no
            weights. Default: the ``sample_weight`` of a data set (`fastmlp.data.Table`); else all rows count alike.
        epochs: passes over the training data, at least 1; default 10. The training may end earlier (``patience``).
        batch_size: rows per step, at least 1; default 128.
        optimizer: a name that `TrainStep` takes; default "sgd". Engine "autograd" takes those that torch.optim has.
        lr: base learning rate, above 0. It has no default, since the best one depends on data and model.
        loss: "cross_entropy" or "softmax_squared_error" (class numbers), "mse", "l1", "huber" or "bce" (values; the
            last one takes logits and targets from 0 to 1); default "cross_entropy".
        momentum: in [0, 1); default: 0.9 for "sgd", else as `TrainStep`.
        weight_decay: at least 0; default: 0.
        nesterov: Nesterov's momentum; default: True for "sgd"; without effect when momentum is 0.
        schedule: "constant", "linear" (default), "cosine", or a function; see `fastmlp.train.schedules`.
            With "linear" and "cosine" the learning rate falls towards 0 over all ``epochs``.
        warmup: share of all steps to warm up in, [0, 1); default 0.05; "constant" has no warm-up.
        seed: of the order of the rows and of the held-out share; default 0. The starting weights are the model's.
        engine: what runs the steps: "step" (`fastmlp.TrainStep`, for MLPs), "autograd", "auto" (default: "step" for a
            fastmlp.MLP, "autograd" for all else), or a ready `fastmlp.train.engines.Engine`. A ready engine has its own
            optimizer and loss, so the arguments about the optimizer have no effect.
        patience: end the training when so many epochs in a row had no validation loss below the best, at least 1;
            default: never. It needs ``validation``.
        checkpoint: a file that gets the state of the run, or a function that is called with it; default: none.
        resume: a file that ``checkpoint`` wrote, or a state, to go on from. Data, model and all other arguments must be
            those of the run, but ``epochs`` and ``patience`` may be larger. A schedule that depends on the number of
            steps follows the new number from there on. A file that is not there is an error. Default: begin anew.
        on_epoch: called with the result after each epoch, when the model has the parameters of this epoch. If it
            returns True, the training ends. Default: none.
        on_progress: called every `CHECK_EVERY` steps and at the end of each epoch. If it returns True, the training
            stops at once: ``checkpoint`` gets the steps of the unfinished epoch, the model keeps its parameters, and
            the test data is not looked at. Default: none.
        settings: further settings of the optimizer, by `TrainStep`'s names: betas, eps, max_grad_norm, ... With engine
            "step" also its further options, such as class_weight, label_smoothing, param_groups and dtype. Evaluations,
            and so ``patience``, take the plain loss without these options; but the rows of ``ignore_index`` do not
            count there either. With ``process_group``, all processes call `fit` with the same arguments, and divide
            each batch.

    Returns:
        The results of all epochs; ``history.best`` is the best epoch's.

    Raises:
        ValueError: an argument outside its range, an unknown name, no training data, targets of another shape, or an
            argument that differs from that of the run to resume.
        RuntimeError: inputs, targets and model do not fit, or are on two devices.
        IndexError: a label outside [0, classes).
        TypeError: data of another kind, an ensemble, engine "step" for a model that is not an MLP, an unknown setting,
            or an engine without ``state_dict`` where ``checkpoint`` or ``resume`` is given.
        OSError: ``checkpoint`` cannot be written or ``resume`` cannot be read. (A damaged file is a RuntimeError.)
        DivergenceError: the loss or a parameter became NaN or infinite, or the loss exploded (a RuntimeError).
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if not (name == "patience" and value is None) and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if patience is not None and validation is None:
        raise ValueError("patience needs validation data to judge the epochs by; add validation=0.1, or a data set")
    settings |= {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
    if settings.get("param_groups") is not None:
        settings["param_groups"] = list(settings["param_groups"])  # an iterator would be empty after its first use
    if isinstance(engine, str):
        engine = engine_for(model) if engine == "auto" else engine
        if engine not in ENGINES:
            raise ValueError(unknown("engine", engine, ("auto", *ENGINES)))
        options = {name: settings.pop(name) for name in step_options() if name in settings}
        if options and engine != "step":
            raise ValueError(f"{', '.join(options)} needs engine 'step', got engine {engine!r}")
        rule = usual_rule(optimizer=optimizer, lr=lr, **settings)
        settings = {name: getattr(rule, name) for name in rule.settings} | options
    else:
        checked_rule(lr=lr)
        settings = {"lr": lr}
    ignored = settings.get("ignore_index")
    x, y = checked(model, train, loss, ignored)
    if sample_weight is None:
        sample_weight = getattr(train, "sample_weight", None)
    weights = None if sample_weight is None else checked_weights(sample_weight, y)
    if isinstance(validation, (int, float)):
        kept, held = (rows.to(x.device) for rows in held_out(y, validation, seed))
        x, y, weights, validation = x[kept], y[kept], of_rows(weights, kept), (x[held], y[held])
    for dataset in (test, validation):
        if dataset is not None:
            checked(model, dataset, loss, ignored)
    judge, split = (test, "test") if validation is None else (validation, "validation")
    n = len(y)
    steps = -(-n // batch_size)
    factor = lr_factor(schedule, epochs * steps, warmup)
    state: RunState | None = None
    about: dict[str, Any] = {}
    if checkpoint is not None or resume is not None:
        kinds = {"optimizer": optimizer, "engine": engine} if isinstance(engine, str) else {}
        about = {"epochs": epochs, "batch_size": batch_size, "loss": loss, **kinds, **settings, "seed": seed}
        about |= {"schedule": schedule if isinstance(schedule, str) else getattr(schedule, "__name__", "")}
        about |= {"warmup": warmup, "patience": patience, "model": repr(model)}
        about |= {"validation": None if validation is None else fingerprint(*tensors(validation))}
        about |= {"data": fingerprint(x, y)}
        about |= {"sample_weight": None if weights is None else fingerprint(weights, weights)}
        about |= {"dropout": model.dropout} if isinstance(model, MLP) and model.dropout else {}
        if settings.get("param_groups") is not None:
            about["param_groups"] = by_names(settings["param_groups"], dict(model.named_parameters()))
        for name in ("process_group", "cuda_graph"):  # the run may go on with another number of processes
            about.pop(name, None)
    if resume is not None:
        state = resume if isinstance(resume, RunState) else load_state(resume)
        state.check(about, model)
        adopt_choices(state.choices)
        model.load_state_dict(state.model)
    runner: Engine
    if isinstance(engine, str):
        runner = ENGINES[engine](model, optimizer=optimizer, loss=loss, **settings)
    else:
        runner = engine
    if about and not all(hasattr(runner, name) for name in ("state_dict", "load_state_dict")):
        raise TypeError(
            f"checkpoint and resume need an engine with state_dict and load_state_dict, got {type(runner).__name__}"
        )

    more: dict[str, Tensor] = {} if weights is None else {"sample_weight": weights}
    if more and "sample_weight" not in inspect.signature(runner.epoch).parameters:
        raise TypeError(f"sample_weight needs an engine whose epoch takes it; {type(runner).__name__}.epoch does not")
    check_shares(batch_size, n, getattr(runner, "share", (0, 1))[1])
    generator = torch.Generator().manual_seed(seed)
    history = History(loss=loss)
    average: Callable[[], dict[str, Tensor] | None] = getattr(runner, "average", lambda: None)
    chosen = validation is not None or average() is not None
    good = best = _snapshot(model)
    if state is None:
        highest_loss = EXPLODED * loss_of_a_guess(model, x[:_GUESS_ROWS], y[:_GUESS_ROWS], loss, ignored)
    else:
        highest_loss = state.highest_loss
        runner.load_state_dict(state.engine)  # type: ignore[attr-defined]
        generator.set_state(state.order)
        history.epochs += state.history.epochs
        best = good if state.best is None else {name: t.to(good[name].device) for name, t in state.best.items()}

    def keep(parameters: dict[str, Any], order: Tensor, step: int = 0, loss_sum: float = 0.0, spent: float = 0) -> None:
        """Give the state of the run to ``checkpoint``."""
        if checkpoint is None:
            return
        other = best if chosen and best is not parameters else None
        kept = runner.state_dict()  # type: ignore[attr-defined]
        so_far = dataclasses.replace(history, epochs=[*history.epochs])
        now = RunState(
            parameters, kept, order, so_far, about, highest_loss, other, step, loss_sum, spent, named_choices()
        )
        if callable(checkpoint):
            checkpoint(now)
        else:
            save_state(checkpoint, now)

    def factors(epoch: int, first: int, last: int) -> list[float]:
        of_steps = [factor((epoch - 1) * steps + step) for step in range(first, last)]
        bad = next((value for value in of_steps if not (math.isfinite(value) and value >= 0)), None)
        if bad is not None:
            raise ValueError(f"expected the schedule to return finite numbers of at least 0, got {bad}")
        return of_steps

    def stop(what: str, epoch: int, first: int, last: int) -> DivergenceError:
        model.load_state_dict(good)
        highest = lr * max(factors(epoch, first, last))
        where = f"at step {last}" if last == first + 1 else f"between steps {first + 1} and {last}"
        return DivergenceError(
            f"training diverged: {what} in epoch {epoch}, {where} of {steps}, at learning rates up to {highest:.4g}; "
            f"expected finite numbers. Try a learning rate of {lr / 10:.2g} or smaller",
            epoch,
            (first + 1, last),
            history,
        )

    for epoch in range(len(history.epochs) + 1, epochs + 1):
        if patience is not None and history.epochs and epoch - 1 - history.best.epoch >= patience:
            break
        order_state = generator.get_state()
        order = torch.randperm(n, generator=generator, device="cpu").to(x.device)
        model.train()
        done, loss_sum, spent = (0, 0.0, 0.0) if state is None else (state.step, state.loss_sum, state.seconds)
        state, stopped = None, False
        counted = None if ignored is None else rows_that_count(y[order] != ignored, batch_size)
        start = time.perf_counter() - spent
        for first in range(done, steps, CHECK_EVERY):
            last = min(first + CHECK_EVERY, steps)
            rows = order[first * batch_size : last * batch_size]
            mean, count = runner.epoch(x, y, batch_size, rows, factors(epoch, first, last), **more).item(), len(rows)
            losses = getattr(runner, "step_losses", None)
            if counted is not None and losses is not None and math.isnan(mean):
                own, some = mean_of_counted(losses, counted[first:last])
                mean, count = own.item(), int(some)
            if count and not math.isfinite(mean):
                raise stop(f"the loss became {mean}", epoch, *_first_bad_step(runner, first, last, counted))
            loss_sum += mean * count if count else 0.0
            if on_progress is not None and on_progress(Progress(epoch, epochs, last, steps, mean)) is True:
                if last < steps:
                    keep(_snapshot(model), order_state, last, loss_sum, time.perf_counter() - start)
                    return history
                stopped = True
        # No loss shows the update of the last step yet.
        if not _all_finite(model):
            raise stop("a parameter became NaN or infinite", epoch, first, last)
        seconds = time.perf_counter() - start
        averaged = average()
        scores = {} if judge is None else _scores(model, judge, split, loss, averaged, ignored)
        judged = scores.get(f"{split}_loss")
        if judged is not None and not math.isfinite(judged):
            raise stop(f"the loss on the {split} data became {judged}", epoch, first, last)
        if min(mean, mean if judged is None else judged) > highest_loss:
            raise stop(f"the loss became {mean:.3g}, {EXPLODED} times that of a guess or more", epoch, first, last)
        rows_counted = n if counted is None else int(counted.sum())
        result = EpochResult(epoch, loss_sum / rows_counted, None, None, seconds, n / seconds)
        history.epochs.append(dataclasses.replace(result, **scores))
        good = _snapshot(model)
        if history.best is history.last:
            best = good if averaged is None else averaged
        keep(good, generator.get_state())
        if on_epoch is not None and on_epoch(history.last) is True:
            break
        if stopped:
            return history
    if chosen and history.epochs:
        model.load_state_dict(best)
        if validation is not None and test is not None:
            place = history.epochs.index(history.best)
            history.epochs[place] = dataclasses.replace(
                history.best, **_scores(model, test, "test", loss, None, ignored)
            )
    return history


def _scores(
    model: nn.Module,
    data: Samples,
    split: str,
    loss: str,
    parameters: Mapping[str, Tensor] | None,
    ignored: int | None,
) -> dict[str, Any]:
    """Loss and metric on some data, as the fields of an `EpochResult`."""
    value, metric = evaluate(model, data, loss=loss, parameters=parameters, ignore_index=ignored)
    return {f"{split}_loss": value, f"{split}_{metric_of(loss)}": metric}


def _first_bad_step(engine: Engine, first: int, last: int, counted: Tensor | None) -> tuple[int, int]:
    """(step, step + 1) of the first loss in the stretch that is not finite; the stretch if no loss was kept."""
    losses, bad = getattr(engine, "step_losses", None), []
    if losses is not None:
        wrong = losses.isfinite().logical_not().cpu()
        wrong = wrong if counted is None else wrong & (counted[first:last] > 0)
        bad = wrong.nonzero().flatten().tolist()
    return (first + bad[0], first + bad[0] + 1) if bad else (first, last)


def _snapshot(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _all_finite(model: nn.Module) -> bool:
    flags = [p.detach().isfinite().all() for p in model.parameters()]
    return not flags or bool(torch.stack(flags).all().item())
