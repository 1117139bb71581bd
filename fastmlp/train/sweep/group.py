"""The training of a group of members as one `fastmlp.MLPEnsemble`, each member as `fastmlp.fit` would train it alone.

A member's starting weights are those of `initialize_` with its seed, its order of the rows comes from a generator with
its seed, and its learning rate follows the same schedule. Only dropout's masks are others, since the members of a group
share one seed of them. After every epoch, each member is evaluated on its own validation rows, and the parameters of
its best epoch are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import functional
from ...nn import MLP, MLPEnsemble
from ...step import TrainStep
from ...step.per_member import SETTINGS as PER_MEMBER
from ..ignored import mean_of_counted, rows_that_count
from ..initial import initialize_
from ..loop import CHECK_EVERY
from ..results import EXPLODED, Progress
from ..schedules import lr_factor
from ..scores import loss_of_a_guess, metric_of, takes_values, with_ignored
from .plan import EVALUATED, FEWEST, MOST_ROWS, Data, Member, Training

_GUESS_ROWS = 2048


@dataclass(frozen=True)
class Result:
    """What a member reached, at its epoch of the least validation loss; None where no epoch was finished.

    Attributes:
        validation_loss: mean over the member's validation rows.
        validation_metric: accuracy from 0 to 1, or R2; None where the rows have none, as `fastmlp.train.evaluate`.
        train_loss: mean over the epoch's rows, each at the parameters of its step.
        best_epoch: of these results, from 1.
        epochs: finished epochs.
        diverged: the epoch in which training diverged, as `fastmlp.train.DivergenceError` describes it; else None.
    """

    validation_loss: float | None = None
    validation_metric: float | None = None
    train_loss: float | None = None
    best_epoch: int | None = None
    epochs: int = 0
    diverged: int | None = None


@dataclass(frozen=True)
class EpochOfGroup:
    """Where a group is after an epoch: all numbers are of the members that still train.

    Attributes:
        train_loss, validation_loss: medians over the members.
        best_loss: the least validation loss of a member.
        active: how many members have not diverged.
        seconds: time of the training steps.
        images_per_second: training rows of all members per second.
    """

    epoch: int
    train_loss: float
    validation_loss: float
    best_loss: float
    active: int
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Held:
    """The rows that validate the members, all on the device.

    Attributes:
        x, y: inputs and targets.
        rows: int64 [divisions, m], the validation rows of each division.
        of: int64 [E], the division of each member.
        count: float64 [divisions], the number of targets that count.
        reference: float64 [divisions], what the metric divides by: the variance for R2, and ``count`` for the accuracy;
            NaN where there is no metric.
        ignored: the label of rows that do not count; None: all count.
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    of: Tensor
    count: Tensor
    reference: Tensor
    ignored: int | None = None

    @classmethod
    def made(cls, x: Tensor, y: Tensor, rows: Tensor, of: Tensor, loss: str, ignored: int | None = None) -> Held:
        """With ``count`` and ``reference`` computed."""
        count = torch.full((len(rows),), rows.shape[1] * y[0].numel(), dtype=torch.float64, device=x.device)
        if ignored is not None:
            count = (y[rows.to(y.device)] != ignored).sum(1).double()
        found = count.clone()
        for number in range(len(rows) if takes_values(loss) else 0):
            wide = y[rows[number]].double()
            if metric_of(loss) == "r2":
                variance = (wide - wide.mean(0)).square().sum()
                found[number] = torch.where(variance > 0, variance, float("nan"))
            elif not bool(((wide == 0) | (wide == 1)).all()):
                found[number] = float("nan")
        return cls(x, y, rows.to(x.device), of.to(x.device), count, found, ignored)


class _Rows:
    """The inputs of a group, and each division's rows of them.

    Attributes:
        seeds: of the divisions.
        x, y, weight: training inputs and targets of all divisions, and perhaps weights of the rows.
        rows: int64 [divisions, n] on the CPU, the training rows of each division.
        of: int64 [E] on the CPU, the division of each member.
        held: what validates the members.
    """

    def __init__(self, members: Sequence[Member], data: Data, loss: str, ignored: int | None = None) -> None:
        divisions = list(dict.fromkeys(member.division for member in members))
        self.seeds = [seed for seed, _ in divisions]
        self.of = torch.tensor([divisions.index(member.division) for member in members], device="cpu")
        divided = [data.divided(*division) for division in divisions]
        self.rows, held = (torch.stack([rows[part] for rows in divided]) for part in (0, 1))
        if data.prepare is None:
            self.x, self.y, self.weight = data.x, data.y, data.weight
            self.held = Held.made(data.x, data.y, held, self.of, loss, ignored)
            return
        kept, out = ([rows.to(data.x.device) for rows in part] for part in (self.rows, held))
        inputs = [data.prepare(data.x[rows]) for rows in kept]
        self.x, x = (torch.cat([f(data.x[rows]) for f, rows in zip(inputs, part, strict=True)]) for part in (kept, out))
        self.y, y = (torch.cat([data.y[rows] for rows in part]) for part in (kept, out))
        self.rows, held = (torch.arange(part.numel(), device="cpu").view(part.shape) for part in (self.rows, held))
        self.weight = None if data.weight is None else torch.cat([data.weight[rows] for rows in kept])
        self.held = Held.made(x, y, held, self.of, loss, ignored)

    def first(self, division: int, count: int) -> tuple[Tensor, Tensor]:
        """The first training rows of a division, as inputs and targets."""
        rows = self.rows[division, :count].to(self.x.device)
        return self.x[rows], self.y[rows]


def train_group(
    members: Sequence[Member],
    data: Data,
    training: Training,
    on_epoch: Callable[[EpochOfGroup], object] | None = None,
    on_progress: Callable[[Progress], object] | None = None,
) -> tuple[list[Result], dict[str, Tensor]]:
    """Train members of one group, which `grouped` made.

    Returns:
        The result of each member, and by name the parameters [E, ...] of each member's best epoch.
    """
    ignored, device = training.options.get("ignore_index"), data.x.device
    rows = _Rows(members, data, training.loss, ignored)
    ensemble, highest = _started(members, rows, training, device)
    settings = _settings(members, training)
    step = TrainStep(ensemble, training.optimizer, loss=training.loss, **settings, **training.options)
    n, batch_size = rows.rows.shape[1], training.batch_size
    steps = -(-n // batch_size)
    factor = lr_factor(training.schedule, training.epochs * steps, training.warmup)
    generators = [torch.Generator().manual_seed(seed) for seed in rows.seeds]
    results = [Result() for _ in members]
    best = {name: parameter.detach().clone() for name, parameter in ensemble.named_parameters()}
    least = torch.full((len(members),), float("inf"), dtype=torch.float64, device="cpu")
    active = torch.ones(len(members), dtype=torch.bool, device="cpu")

    def stop(bad: Tensor, epoch: int) -> None:
        """Note that the active members among ``bad`` have diverged, and stop them."""
        numbers = (bad & active).nonzero().flatten().tolist()
        for number in numbers:
            results[number] = replace(results[number], diverged=epoch)
            active[number] = False
        if numbers:
            step.active = active

    for epoch in range(1, training.epochs + 1):
        permutations = [torch.randperm(n, generator=generator, device="cpu") for generator in generators]
        orders = rows.rows.gather(1, torch.stack(permutations))
        sums = torch.zeros(len(members), dtype=torch.float64, device="cpu")
        counted: Tensor | None = None
        if ignored is not None:
            counted = rows_that_count(rows.y[orders.to(device)] != ignored, batch_size)[:, rows.of]
        start = time.perf_counter()
        for first in range(0, steps, CHECK_EVERY):
            last = min(first + CHECK_EVERY, steps)
            order = orders[:, first * batch_size : last * batch_size]
            order = order[0] if len(order) == 1 else order.index_select(0, rows.of)
            factors = [factor((epoch - 1) * steps + number) for number in range(first, last)]
            order = order.contiguous().to(device)
            means = step.epoch(rows.x, rows.y, batch_size, order, factors, rows.weight).double().cpu()
            count = torch.full_like(means, order.shape[-1])
            if counted is not None:
                own, count = mean_of_counted(step.losses, counted[first:last])
                means = torch.where(means.isnan(), own, means)
            stop(~means.isfinite() & (count > 0), epoch)
            if not active.any():
                return results, best
            sums += torch.where(count > 0, means * count, 0.0)
            if on_progress is not None:
                on_progress(Progress(epoch, training.epochs, last, steps, _median(means[active])))
        stop(~_finite(ensemble), epoch)
        seconds = time.perf_counter() - start
        judged: dict[str, Tensor] = dict(ensemble.named_parameters())
        if settings["ema_decay"] is not None:
            average = step.ema_state_dict()
            judged = {name: average[name].to(parameter.dtype) for name, parameter in judged.items()}
        losses, metrics = evaluate_members(ensemble, rows.held, training.loss, active, judged)
        stop(~losses.isfinite() | (torch.minimum(means, losses) > highest), epoch)
        if not active.any():
            return results, best
        trained = sums / (n if counted is None else counted.sum(0))
        improved = active & (losses < least)
        least = torch.where(improved, losses, least)
        _keep(best, judged, improved)
        for number in active.nonzero().flatten().tolist():
            results[number] = replace(results[number], epochs=epoch)
        for number in improved.nonzero().flatten().tolist():
            metric = metrics[number].item()
            results[number] = Result(
                losses[number].item(), None if metric != metric else metric, trained[number].item(), epoch, epoch
            )
        if on_epoch is not None:
            left = losses[active]
            speed = n * len(left) / seconds
            median = _median(trained[active])
            on_epoch(EpochOfGroup(epoch, median, _median(left), left.min().item(), len(left), seconds, speed))
    return results, best


def _started(
    members: Sequence[Member], rows: _Rows, training: Training, device: torch.device
) -> tuple[MLPEnsemble, Tensor]:
    """The ensemble at the start, and the loss [E] that counts as exploded."""
    first = members[0]
    empty = MLPEnsemble(first.sizes, len(members), first.activation, device="meta", dtype=training.dtype)
    ensemble: MLPEnsemble = empty.to_empty(device=device)
    model = MLP(first.sizes, first.activation, device=device, dtype=training.dtype, dropout=first.dropout)
    if first.dropout:
        ensemble.dropout = first.dropout
        ensemble.dropout_state.copy_(initialize_(model, first.seed).dropout_state)
    highest = torch.zeros(len(members), dtype=torch.float64, device="cpu")
    own = dict(model.named_parameters())
    for division, seed in enumerate(rows.seeds):
        numbers = (rows.of == division).nonzero().flatten()
        initialize_(model, seed)
        guess = loss_of_a_guess(model, *rows.first(division, _GUESS_ROWS), training.loss, rows.held.ignored)
        highest[numbers] = EXPLODED * guess
        with torch.no_grad():
            for name, parameter in ensemble.named_parameters():
                parameter[numbers.to(device)] = own[name]
    return ensemble, highest


def _settings(members: Sequence[Member], training: Training) -> dict[str, Any]:
    """The optimizer's settings: those of ``per_member.SETTINGS`` are one per member."""
    rules = [training.rule(member) for member in members]
    settings = {name: [getattr(rule, name) for rule in rules] for name in rules[0].settings}
    return {name: values if name in PER_MEMBER else values[0] for name, values in settings.items()}


def _median(values: Tensor) -> float:
    return values.median().item()


@torch.no_grad()
def _finite(ensemble: MLPEnsemble) -> Tensor:
    """bool [E] on the CPU: whether all parameters of a member are finite numbers."""
    finite = [parameter.detach().isfinite().flatten(1).all(1) for parameter in ensemble.parameters()]
    return torch.stack(finite).all(0).cpu()


@torch.no_grad()
def _keep(best: Mapping[str, Tensor], judged: Mapping[str, Tensor], improved: Tensor) -> None:
    """Copy the parameters of the members ``improved`` [E]."""
    for name, parameter in judged.items():
        numbers = improved.nonzero().flatten().to(parameter.device)
        best[name].index_copy_(0, numbers, parameter.detach().index_select(0, numbers))


@torch.no_grad()
def evaluate_members(
    ensemble: MLPEnsemble, held: Held, loss: str, members: Tensor, parameters: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Mean losses and metrics of members on their own rows, as `fastmlp.train.evaluate` of each member.

    Args:
        members: bool [E] on the CPU, the members to evaluate.
        parameters: in place of the ensemble's own, by their names; default: these.

    Returns:
        The losses and the metrics, each float64 [E] on the CPU; NaN for the other members, and where there is no
        metric.
    """
    numbers = members.nonzero().flatten()
    some, e = numbers.to(held.x.device), len(numbers)
    named: Mapping[str, Tensor] = dict(ensemble.named_parameters()) if parameters is None else parameters
    weights = [named[f"layers.{layer}.weight"] for layer in range(len(ensemble.layers))]
    biases = [named.get(f"layers.{layer}.bias") for layer in range(len(ensemble.layers))]
    if e < len(members):
        weights = [weight.index_select(0, some) for weight in weights]
        biases = [None if bias is None else bias.index_select(0, some) for bias in biases]
    of, activations = held.of[some], list(ensemble.activations)
    function, values = with_ignored(loss, held.ignored), takes_values(loss)
    total, right, residual = torch.zeros((3, e), dtype=torch.float64, device=held.x.device).unbind()
    for part in held.rows.split(min(MOST_ROWS, max(FEWEST, EVALUATED // e)), 1):
        rows = part[0] if len(part) == 1 else part.index_select(0, of)
        outputs, targets = functional.mlp(held.x[rows], weights, biases, activations, e), held.y[rows]
        outputs = outputs.double() if values else outputs.float()
        targets = (targets.double() if values else targets).expand(e, part.shape[1], *targets.shape[rows.dim() :])
        terms = function(outputs.flatten(0, 1), targets.flatten(0, 1), reduction="none")
        total += terms.view(e, -1).sum(1, dtype=torch.float64)
        if values:
            residual += (outputs - targets).square().sum((1, 2))
            right += ((outputs > 0) == (targets > 0.5)).sum((1, 2))
        else:
            found = outputs.argmax(2) == targets
            right += (found if held.ignored is None else found & (targets != held.ignored)).sum(1)
    reference = held.reference[of]
    losses, metrics = torch.full((2, len(members)), float("nan"), dtype=torch.float64, device="cpu").unbind()
    losses[numbers] = (total / held.count[of]).cpu()
    metrics[numbers] = (1 - residual / reference if metric_of(loss) == "r2" else right / reference).cpu()
    return losses, metrics
