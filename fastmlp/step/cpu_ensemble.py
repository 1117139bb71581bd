"""The training step of an ensemble on plain torch, with the interface of ``cpu_step.TorchStep``.

The active members are divided into pieces (``cpu_members``): one piece for all, or some for each thread
(``fastmlp.cpu.ensembles``). Members that are not active are in no piece. Where active members lie side by side, a piece
works on views of the ensemble's tensors. Else it copies its members' tensors side by side and back at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import fields, replace
from functools import partial
from itertools import groupby
from math import nan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import cpu
from ..base.losses import takes_classes
from .cpu_dropout import StepDropout, advance, numbers
from .cpu_member_span import MemberLayer, Packed, Span, target_dims
from .cpu_members import Piece
from .cpu_native_members import NativePiece, native_epoch, native_units
from .groups import Groups
from .loss_options import PLAIN, LossOptions, check_labels_of_members
from .loss_scale import START
from .optimizers import Optimizer
from .per_member import SETTINGS, PerMember

if TYPE_CHECKING:
    from .data_parallel import DataParallel

#: Batch sizes whose pieces are kept.
_PLANS = 4
#: Runs of active members that pieces take as they are; more of them are packed.
_RUNS = 2
#: Bytes that a thread's cache has room for, and multiplications of a step to measure.
_CACHE, _MEASURED = 1 << 19, 1 << 25


class TorchEnsemble:
    """Forward, backward and update of all members; ``fastmlp.TrainStep`` is the public way to it.

    Args:
        layers: modules with parameters [E, N, K] and [E, N].
        active: bool [E], read at every step.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        rule: Optimizer,
        loss: str,
        dtype: torch.dtype,
        active: Tensor,
        options: LossOptions = PLAIN,
        groups: Groups | None = None,
        parallel: DataParallel | None = None,
    ) -> None:
        self._modules, self.rule, self.loss, self.dtype, self.active = layers, rule, loss, dtype, active
        self.options = options
        #: What a pass drops; it may be assigned between steps.
        self.dropout: StepDropout | None = None
        #: The rules of the param groups, and the group of each master.
        self.rules = [rule] if groups is None else groups.rules
        self.group_of: list[int] | None = None if groups is None else groups.numbers
        first = layers[0].weight
        self.device, self.members = first.device, first.shape[0]
        self._classes = layers[-1].weight.shape[-2] if takes_classes(loss) else None
        self.layers: list[MemberLayer] = []
        self.masters: list[Tensor] = []
        for module in layers:
            layer = MemberLayer(module, dtype, len(self.masters))
            self.masters += [c.master for c in layer.copies if c.trained]
            self.layers.append(layer)
        self.lowest = next(i for i, layer in enumerate(self.layers) if layer.train_w or layer.train_b)
        #: The members' loss scales of float16 and good steps since each last moved.
        self.scales: tuple[Tensor, Tensor] | None = None
        if dtype == torch.float16:
            scale = torch.full((self.members,), START, dtype=torch.float32, device=self.device)
            self.scales = scale, torch.zeros_like(scale, dtype=torch.int32)
        #: Gradients and optimizer state exist only where the optimizer needs them all at once.
        self.plain = rule.is_plain_sgd and self.scales is None and rule.ema_decay is None and groups is None
        self.plain &= parallel is None
        self._parallel, numels = parallel, [t[0].numel() for t in self.masters]
        self._sums = None if parallel is None else parallel.sums(numels, self.masters[0].dtype, self.members)
        self.states = {name: [torch.zeros_like(t) for t in self.masters] for name in rule.kept}
        self.counts = torch.zeros(self.members, dtype=torch.float32, device=self.device)
        self.zero = torch.zeros((), dtype=torch.float32, device=self.device)
        self._grads: list[Tensor] | None = None
        self._copies = [c for layer in self.layers for c in layer.copies if not c.is_one]
        self._trained_copies = [c for c in self._copies if c.trained]
        #: The learning rate of all members, NaN where they have their own, which ``rates`` has.
        self.rate = nan
        self.rates = torch.zeros(self.members, dtype=self.masters[0].dtype, device=self.device)
        self._rates_now: list[Any] = []
        #: Raised when pieces must group their members anew.
        self.version = 0
        self._seen = torch.ones_like(active)
        self._ids = list(range(self.members))
        self._plans: dict[int, tuple[str, Sequence[Sequence[Piece | NativePiece]]]] = {}
        self._rows = 0
        self._buffers: dict[tuple[object, ...], Tensor] = {}
        self._way: str | None = None

    # Settings

    def settings_changed(self) -> None:
        """Take up the rule's settings; those of its ``structure`` are as they were."""
        self.version += 1
        self._rates_now = []

    def rates_changed(self) -> None:
        """Take up other learning rates; the other settings are as they were."""
        self.settings_changed()

    @staticmethod
    def structure(rule: Optimizer) -> tuple[object, ...]:
        """What the engine is built for."""
        return *rule.structure, rule.is_plain_sgd

    def settings_of(self, member: int) -> tuple[tuple[tuple[str, float], ...], ...]:
        """Those settings of a member that may be its own, of each param group."""
        return tuple(self._settings_of(member, *of) for of in zip(self.rules, self._rates_now, strict=True))

    @staticmethod
    def _settings_of(member: int, rule: Optimizer, rate: Any) -> tuple[tuple[str, float], ...]:
        values = {field.name: getattr(rule, field.name) for field in fields(rule) if field.name in SETTINGS}
        values["lr"] = rate
        return tuple((name, value[member] if isinstance(value, PerMember) else value) for name, value in values.items())

    def rules_with(self, settings: tuple[tuple[tuple[str, float], ...], ...]) -> list[Optimizer]:
        """The rule of each param group with a member's settings."""
        rules = [copy(rule) for rule in self.rules]  # a tenth of the time of dataclasses.replace
        for rule, own in zip(rules, settings, strict=True):
            vars(rule).update(own)
        return rules

    def _set_rates(self, rates: list[Any]) -> None:
        """Take up the learning rate of each param group."""
        if rates == self._rates_now:
            return
        rate, same = rates[0], len(rates) == 1 and not isinstance(rates[0], PerMember)
        if not (same and self.rate == self.rate):
            self.version += 1  # the groups of members were made by the rates
        self._rates_now, self.rate = rates, rate if same else nan
        if isinstance(rate, PerMember):
            self.rates.copy_(torch.tensor(rate, dtype=self.rates.dtype, device="cpu"))

    # Steps

    @property
    def grads(self) -> list[Tensor]:
        """The gradients that ``update`` applies, one per parameter; allocated, as zeros, when asked for."""
        if self._grads is None and self._sums is not None:
            self._grads = [part.view(t.shape) for part, t in zip(self._sums.parts, self.masters, strict=True)]
        elif self._grads is None:
            self._grads = [torch.zeros_like(t) for t in self.masters]
        return self._grads

    def step(self, x: Tensor, y: Tensor, out: Tensor, weight: Tensor | None = None) -> None:
        """One step on x [M, K] or [E, M, K] (float or uint8) and targets; writes the losses into ``out`` [E].

        ``weight`` are sample weights [M] or [E, M].
        """
        self._set_rates([rule.lr for rule in self.rules])
        if self._sums is not None:
            self.look_at(y)
        self._train(x, y, out, None, weight)

    def gradients(
        self, x: Tensor, y: Tensor, out: Tensor, *, accumulate: bool = False, weight: Tensor | None = None
    ) -> list[Tensor]:
        """Gradients of the trained masters, in the order of the parameters; parameters stay as they are."""
        self.look_at(y)
        kept = [g.clone() for g in self.grads] if accumulate else None
        self._set_rates([rule.lr for rule in self.rules])
        self._mean_gradients(x, y, out, None, weight)
        if kept is not None:
            torch._foreach_add_(self.grads, kept)
        return self.grads

    def update(self) -> None:
        """Apply the optimizer to what ``gradients`` left."""
        self._set_rates([rule.lr for rule in self.rules])
        self._follow()
        self._apply()

    def _apply(self) -> None:
        way, pieces = self._planned(self._rows)
        self._spread(way, [partial(_each, [piece.update for piece in part]) for part in pieces])
        self._publish()

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: Tensor,
        lrs: Tensor,
        losses: Tensor,
        weight: Tensor | None = None,
    ) -> None:
        """Steps over ``order`` [n] or [E, n], with learning rates [steps, E] or [steps, E, G]; losses are [steps, E].

        ``weight`` are sample weights [N] or [E, N] of all rows. All class numbers are classes.
        """
        self._follow()
        rows = min(batch_size, order.shape[-1])  # of the largest step
        _, parts = self._planned(rows)
        pieces = [piece for part in parts for piece in part if isinstance(piece, NativePiece)]
        if pieces:
            self._set_rates([rule.lr for rule in self.rules])
            if native_epoch(pieces, images, labels, rows, order, lrs, losses, weight):
                if self.dropout is not None:
                    advance(self.dropout, len(losses))
                return
        of_groups = lrs.view(len(lrs), self.members, -1).movedim(-1, 1).tolist()
        for rows, rates, out in zip(order.split(batch_size, -1), of_groups, losses.unbind(), strict=True):
            self._set_rates([each[0] if len(set(each)) == 1 else PerMember(each) for each in rates])
            self._train(images, labels, out, rows, weight)

    def _train(self, x: Tensor, y: Tensor, out: Tensor, rows: Tensor | None, weight: Tensor | None) -> None:
        if self._sums is None:
            self._run(x, y, out, rows, weight, update=True)
            self._publish()
        else:
            self._mean_gradients(x, y, out, rows, weight)
            self._apply()

    def _mean_gradients(self, x: Tensor, y: Tensor, out: Tensor, rows: Tensor | None, weight: Tensor | None) -> None:
        """Those of the active members, 0 of the others; over the rows of all processes."""
        for grad in self.grads:
            grad.zero_()
        self._run(x, y, out, rows, weight, update=False)
        if self._sums is not None and self._parallel is not None:
            if rows is not None:
                y = self._rows_of("y", y, rows, target_dims(y))
                weight = None if weight is None else self._rows_of("weight", weight, rows, 1)
            self._sums.reduce(out, self._parallel.counted_rows(self.loss, y, weight, self.options))

    def _run(
        self, x: Tensor, y: Tensor, out: Tensor, rows: Tensor | None, weight: Tensor | None, *, update: bool
    ) -> None:
        self._follow()
        x, y = self._batch(x, y, rows)
        if weight is not None and rows is not None:
            weight = self._rows_of("weight", weight, rows, 1)
        self._rows = x.shape[-2]
        way, pieces = self._planned(self._rows)
        if rows is None and update and not (self._in_one_call(way, pieces) and weight is None):
            self.look_at(y)
        if len(self._ids) < self.members:
            out.fill_(nan)
        of_pass = (0, 0) if self.dropout is None else numbers(self.dropout)
        if len(pieces) == 1 and way != "alone":
            for piece in pieces[0]:
                piece.run(x, y, out, update, weight, of_pass)
        else:
            self._spread(
                way,
                [partial(_each, [partial(p.run, x, y, out, update, weight, of_pass) for p in part]) for part in pieces],
            )
        if self.dropout is not None:
            advance(self.dropout)

    def look_at(self, y: Tensor) -> None:
        """IndexError for a class number of any member that is no class."""
        check_labels_of_members(y, self._classes, self.options)

    def _in_one_call(self, way: str, pieces: Sequence[Sequence[Piece | NativePiece]]) -> bool:
        """Whether one piece of machine code has all members; it looks at all class numbers before anything changes."""
        single = len(pieces) == 1 and way != "alone" and len(pieces[0]) == 1
        return single and isinstance(pieces[0][0], NativePiece) and self.options.is_plain

    def _spread(self, way: str, parts: list[Callable[[], None]]) -> None:
        if way in ("batched", "each"):
            _each(parts)
        else:
            cpu.at_once(parts)

    def _follow(self) -> None:
        """Take up values that were written into parameters, and which members are active."""
        for copies in self._copies:
            copies.follow()
        if not torch.equal(self.active, self._seen):
            self._seen.copy_(self.active)
            self._ids = self.active.nonzero().flatten().tolist()
            self._plans.clear()
            self.version += 1

    def _publish(self) -> None:
        for copies in self._trained_copies:
            copies.publish()

    def _batch(self, x: Tensor, y: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """X in the compute dtype and Y, of the given rows."""
        if rows is not None:
            x, y = self._rows_of("x", x, rows, 2), self._rows_of("y", y, rows, target_dims(y))
        if x.dtype == self.dtype:
            return x, y
        into = self._buffer("converted", x.shape, self.dtype).copy_(x)
        return into.mul_(1 / 255) if x.dtype == torch.uint8 else into, y

    def _rows_of(self, name: str, t: Tensor, rows: Tensor, dims: int) -> Tensor:
        """Rows [M] or [E, M] of a tensor that has ``dims`` dimensions, or one more in front for the members."""
        m, own = rows.shape[-1], t.dim() > dims
        if rows.dim() == 1:
            shape = (self.members, m, *t.shape[2:]) if own else (m, *t.shape[1:])
            return torch.index_select(t, int(own), rows, out=self._buffer(name, shape, t.dtype))
        rest = t.shape[2:] if own else t.shape[1:]
        into = self._buffer(name, (self.members, m, *rest), t.dtype)
        if not own:
            torch.index_select(t, 0, rows.reshape(-1), out=into.view(-1, *rest))
            return into
        index = rows if dims == 1 else rows.unsqueeze(-1).expand(-1, -1, *rest)
        return torch.gather(t, 1, index, out=into)

    def _buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        key = name, *shape, dtype
        if key not in self._buffers:
            if len(self._buffers) > 3 * _PLANS:
                self._buffers.clear()
            self._buffers[key] = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        return self._buffers[key]

    # Pieces

    def _planned(self, m: int) -> tuple[str, Sequence[Sequence[Piece | NativePiece]]]:
        """How the pieces run, and those of each thread."""
        if m not in self._plans:
            if len(self._plans) == _PLANS:
                del self._plans[next(iter(self._plans))]
            way = self._way or self._measured(m)
            units = self._units(m) if way in cpu.NATIVE_WAYS else None
            if units is not None:
                shares = self._shares(1 if way == "native alone" else torch.get_num_threads())
                self._plans[m] = way, [[self._native(ids, m, units)] for ids in shares]
            else:
                self._plans[m] = way, self._pieces(way, m)
        return self._plans[m]

    def _pieces(self, way: str, m: int) -> list[list[Piece]]:
        """Those on operators of each thread."""
        each = way == "each"
        return [[Piece(self, span, m, each=each) for span in part] for part in self._spans(way, m)]

    def _shares(self, threads: int) -> list[list[int]]:
        """The active members of each thread."""
        size = max(1, -(-len(self._ids) // threads))
        return [self._ids[start : start + size] for start in range(0, len(self._ids), size)]

    def _units(self, m: int) -> cpu.NativeUnits | None:
        """The machine code for ``m`` rows, whose steps are whole: nothing comes between gradients and update."""
        return None if self._sums is not None else native_units(self, m)

    def _native(self, ids: list[int], m: int, units: cpu.NativeUnits) -> NativePiece:
        """The piece of some members by machine code."""
        return NativePiece(self, ids, m, units, lambda: [Piece(self, span, m) for span in self._span(ids)])

    def _spans(self, way: str, m: int) -> Iterator[list[Span]]:
        """The spans of active members of each thread."""
        if not self._ids:
            return
        together = way in ("batched", "each", "alone", "native alone")
        parts = 1 if together else min(torch.get_num_threads(), len(self._ids))
        size = -(-len(self._ids) // parts)
        most = max(1, _CACHE // self._bytes(m)) if way == "small" else size
        for start in range(0, len(self._ids), size):
            part = self._ids[start : min(start + size, len(self._ids))]
            few = -(-len(part) // -(-len(part) // most))
            chunks = [part[i : i + few] for i in range(0, len(part), few)]
            yield [span for chunk in chunks for span in self._span(chunk)]

    def _span(self, ids: list[int]) -> list[Span]:
        """One span of consecutive members for each of few runs, else one of copies."""
        runs = [[e for _, e in run] for _, run in groupby(enumerate(ids), lambda pair: pair[1] - pair[0])]
        return [Span(run) for run in runs] if len(runs) <= _RUNS else [Packed(ids, self.device)]

    def _bytes(self, m: int) -> int:
        """What a member's step moves."""
        weights = sum(layer.weight[0].numel() for layer in self.layers)
        values = sum(layer.weight.shape[1] for layer in self.layers)
        return self.dtype.itemsize * (2 * m * values + 2 * weights)

    def _measured(self, m: int) -> str:
        """The fastest way for ``m`` rows."""
        sizes = [str(layer.weight.shape[1]) for layer in self.layers]
        names = sorted({layer.activation for layer in self.layers})
        work = m * sum(layer.weight[0].numel() for layer in self.layers)
        threads = torch.get_num_threads()
        members = min(self.members, max(4 * threads, _MEASURED // max(1, work)))
        kind = f"ensemble of {members} to {'-'.join(sizes)} {' '.join(names)} {self.loss} {self.rule.name}"

        ends = self.layers[0].weight.shape[2], self.layers[-1].weight.shape[1]
        largest = m * max(layer.weight[0].numel() for layer in self.layers)
        trial = partial(self._trial, members)
        by_native = self._units(m) is not None
        return cpu.member_way(kind, m, ends, self.dtype, self.device, largest, trial, by_native=by_native)

    def _trial(self, members: int, way: str, m: int) -> Callable[[], object]:
        """A step of ``members`` like these on scratch data."""
        modules = [_Scratch(layer, members) for layer in self._modules]
        own: dict[str, Any] = {name: 1e-3 for name in SETTINGS if isinstance(getattr(self.rule, name, None), PerMember)}
        rule = replace(self.rule, **own)
        net = TorchEnsemble(modules, rule, self.loss, self.dtype, self.active.new_ones(members), self.options)
        net._way = way
        x = self.layers[0].weight.new_ones((m, self.layers[0].weight.shape[2]))
        y = torch.zeros(m, dtype=torch.int64, device=self.device)
        if not takes_classes(self.loss):
            y = x.new_zeros((m, self.layers[-1].weight.shape[1]))
        return partial(net.step, x, y, x.new_empty(members, dtype=torch.promote_types(self.dtype, torch.float32)))

    # State

    def updated(self) -> None:
        """Take the versions of the parameters for those of this engine's last update."""
        for copies in self._copies:
            copies.published()

    def parameter_state(self) -> dict[str, list[Tensor]]:
        """What belongs to each trained parameter, live: optimizer state, and masters of 16 bits."""
        self._follow()
        state = dict(self.states)
        if any(c.master is not c.data for c in self._copies):
            state["master"] = list(self.masters)
        return state

    def counters(self) -> dict[str, list[float]]:
        """Each member's number of updates, if the rule counts; float16's loss scales and good steps."""
        counters = {"step": self.counts.tolist()} if self.rule.counted else {}
        if self.scales is not None:
            counters |= {"loss_scale": self.scales[0].tolist(), "loss_scale_good_steps": self.scales[1].tolist()}
        return counters

    def set_counters(self, counters: dict[str, list[float]]) -> None:
        """What ``counters`` returned; call it after ``parameter_state`` was written to."""
        if "step" in counters:
            self.counts.copy_(torch.tensor(counters["step"], device="cpu"))
        if self.scales is not None and "loss_scale" in counters:
            self.scales[0].copy_(torch.tensor(counters["loss_scale"], device="cpu"))
            self.scales[1].copy_(torch.tensor(counters["loss_scale_good_steps"], device="cpu"))
        self.version += 1
        self._publish()


class _Scratch:
    """A layer like another one with parameters of its own, all of about 1/K; no random number is drawn."""

    def __init__(self, module: Any, members: int) -> None:
        self.activation: str = module.activation
        k = module.weight.shape[2]
        self.weight = module.weight.detach()[:1].new_full((members, *module.weight.shape[1:]), 1 / k)
        self.weight.requires_grad_(module.weight.requires_grad)
        self.bias = None
        if module.bias is not None:
            self.bias = self.weight.detach().new_full((members, module.bias.shape[1]), 1 / k)
            self.bias.requires_grad_(module.bias.requires_grad)


def _each(tasks: Sequence[Callable[[], None]]) -> None:
    for task in tasks:
        task()
