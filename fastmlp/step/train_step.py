"""TrainStep: gather, forward, loss, backward and optimizer update as one operation, without the autograd tape."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import torch
from torch import Tensor, is_inference_mode_enabled
from torch._C import _increment_version

from ..backend import resolve
from ..base.losses import STEP_LOSSES
from ..base.signature import guards
from ..nn import MLP, MLPEnsemble
from .binding import Binding
from .foreign import refusal
from .groups import OWN, grouped
from .in_memory import fake_mode
from .loss_options import loss_options
from .optimizers import OPTIMIZERS, optimizer_of
from .settings import StepOptimizer
from .state import StatefulStep
from .validation import Batches, MemberBatches, check_batch_size, check_dtype, check_is_mlp, check_loss, learning_rates
from .values import check_setting

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from .data_parallel import DataParallel

#: Attributes that cannot be assigned after the step was made.
_FIXED = frozenset({"model", "loss", "dtype", "device", "backend", "optimizer"})
_SETTINGS = frozenset(field.name for rule in OPTIMIZERS.values() for field in fields(rule)) - {"lr"}
#: Losses that are allocated together: few enough to be in the first cache when they are used.
_BLOCK = 32


class TrainStep(StatefulStep):
    """The whole training step of an MLP: ``loss = step(x, y)`` updates the model's own parameters in place.

    On a GPU (backend "triton") a step of an L-layer network is a few kernel launches, 2L - 1 for L > 1, cross-entropy
    of up to 64 classes and up to 1,024 rows (kernels/README.md has the other cases), captured in a CUDA
    graph; on a CPU it is in-place BLAS on buffers allocated once. Results agree with autograd and torch.optim to
    rounding.

    A step does what the model says when it is called. It follows parameters that are frozen or thawed, activations and
    dropout that are changed, ``model.train()`` and ``model.eval()``, values that anybody writes into parameters, and
    settings that are assigned or scheduled. It drops what autograd would drop: in training mode, with the masks of the
    model's ``dropout_state``, whose number of passes each step and each call of ``gradients`` raises by 1. Where it
    cannot follow (hooks, a ``forward`` of the model's own, other layers or parameters) the call raises an error and
    changes nothing. A frozen parameter keeps its optimizer state for the time after. Every update raises the version
    counter of the parameters, so that autograd finds what it saved changed.

    A step belongs to one thread and, on a GPU, to one stream at a time. All its calls share its buffers, so
    simultaneous calls from two threads or two streams race on them. Copies (copy.deepcopy, pickle) have the model, the
    optimizer's state and the settings, and no gradients that wait for ``update``.

    Args:
        model: the MLP, or the MLPEnsemble (``EnsembleStep`` says what is different). Parameters with
            ``requires_grad=False`` stay as they are, and nothing is computed for them.
        optimizer: "sgd" (default), "adam", "adamw" or "rmsprop", with torch.optim's update rules, argument names and
            defaults except of ``lr`` and ``weight_decay``; or "lion", as published (arXiv 2302.06675).
        lr: learning rate, default 1e-3; the attribute ``lr`` changes it between steps. Each number may be a 0-d tensor
            on the CPU.
        momentum, weight_decay, nesterov: default 0, 0, False. (torch's AdamW decays by 0.01 by default.)
        betas, eps: default (0.9, 0.999), of "lion" the published (0.9, 0.99), and 1e-8. A setting that the optimizer
            does not have must keep its default.
        alpha, centered: of "rmsprop"; default 0.99, False.
        amsgrad: of "adam" and "adamw"; default False.
        maximize: go up the gradient of the loss; default False.
        max_grad_norm: scale the gradients so that their global 2-norm is at most this; default None, no clipping.
        loss: "cross_entropy" or "softmax_squared_error" (logits against class numbers int64 [B]), "mse", "l1", "huber"
            or "bce" (values [B, C]). "cross_entropy" also takes probabilities [B, C]. "bce" is
            ``functional.bce_with_logits``, of logits. Each loss is a mean as with torch's default reduction.
        class_weight: of "cross_entropy": [C], a factor of the rows of each class, in the parameters' dtype; default 1.
            The mean divides by the sum of the rows' factors, for probabilities by the number of rows, as torch does.
            The step keeps a copy, so later changes of the tensor change nothing.
        ignore_index: of "cross_entropy": rows with this label have loss and gradient 0 and do not count in the mean.
            Default None: -100 as in torch on a CPU, and with class or sample weights. A GPU would have to count the
            rows at every step for that; there label -100 makes the loss NaN, unless it is given here by name.
        label_smoothing: of "cross_entropy": e in [0, 1], as in torch; default 0.
        pos_weight: of "bce": [C], a factor of the terms with y, as in torch; default 1. Copied like class_weight.
        delta: of "huber": the distance at which the loss becomes linear; default 1.
        param_groups: as torch.optim's, a list of dicts with "params" (parameters or their names, which may be patterns)
            and the group's own "lr" and "weight_decay"; other settings are those of all groups. The parameters that no
            group has are the first group. No decay on biases is [{"params": "*.bias", "weight_decay": 0.0}].
        ema_decay: keep an exponential moving average of the parameters, ema = decay ema + (1 - decay) parameter after
            every update, in float32 (float64 for float64); default None. The average begins with the parameters before
            the first update. ``ema_state_dict`` returns it.
        ema_warmup: the decay of update t is min(ema_decay, (1 + t) / (10 + t)); default False.
        dtype: of the products: default the parameters' own; float32 parameters with float16 or bfloat16 products are
            mixed precision with float32 masters. torch.autocast does not change it.
        cuda_graph: capture steps in CUDA graphs at their second use (default True; only with backend "triton").
        process_group: of ``torch.distributed``, such as ``torch.distributed.group.WORLD``: each process gives a part of
            every batch, of one row or more, and all make the update of the whole batch. The parameters of the group's
            first process are given to all when the step is made. Losses and gradients are those of the whole batch.
            Default None, one process.

    Attributes:
        lr: the learning rate of the next step.
        optimizer: what the schedulers of torch.optim.lr_scheduler take. ``step.optimizer.param_groups[0]`` has all
            settings by their names above; values assigned there count from the next step on. With ``param_groups``
            there are more of them, and a scheduler drives the rate of each.
        losses: [steps] on the device, float32 (float64 for float64): the loss of every step of the last ``epoch``.
        backend: "triton" or "torch", whichever runs the steps.

    Raises:
        TypeError: model is not an MLP, a setting that is no number, another argument, such as one that only torch.optim
            has, or a dtype that nothing computes in.
        ValueError: unknown optimizer or loss, settings out of range, an option that the loss does not have, nothing to
            train, a layer with hooks or of another class (a step would not call them), one parameter in two layers.
        RuntimeError: parameters of different dtypes or devices, or not contiguous; weights of classes or outputs of
            another length, dtype or device; label_smoothing or delta out of range.
    """

    #: The class of steps of ensembles, which ``ensemble_step`` puts here.
    _of_ensemble: ClassVar[type[TrainStep]]
    model: Any

    def __new__(cls, model: MLP | MLPEnsemble, *args: Any, **kwargs: Any) -> TrainStep:
        """A step of an ensemble is an ``EnsembleStep``."""
        if isinstance(model, MLPEnsemble) and not issubclass(cls, TrainStep._of_ensemble):
            if cls is not TrainStep:
                raise TypeError(f"{cls.__name__} is a step of MLPs; a class of steps of ensembles extends EnsembleStep")
            cls = TrainStep._of_ensemble
        return super().__new__(cls)

    def __init__(
        self,
        model: MLP | MLPEnsemble,
        optimizer: str = "sgd",
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        alpha: float = 0.99,
        centered: bool = False,
        amsgrad: bool = False,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        param_groups: Iterable[Mapping[str, Any]] | None = None,
        ema_decay: float | None = None,
        ema_warmup: bool = False,
        loss: str = "cross_entropy",
        class_weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        pos_weight: Tensor | None = None,
        delta: float = 1.0,
        dtype: torch.dtype | None = None,
        cuda_graph: bool = True,
        process_group: ProcessGroup | None = None,
        **others: NoReturn,
    ) -> None:
        check_is_mlp(model)
        check_loss(loss)
        settings: dict[str, Any] = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        settings |= {"betas": betas, "eps": eps, "alpha": alpha, "centered": centered, "amsgrad": amsgrad}
        settings |= {"maximize": maximize, "max_grad_norm": max_grad_norm}
        settings |= {"ema_decay": ema_decay, "ema_warmup": ema_warmup}
        members = getattr(model, "members", None)
        rule = optimizer_of(optimizer, settings, members)
        if others:
            name = next(iter(others))
            raise TypeError(refusal(name, others[name], optimizer, arguments()))
        self._binding = Binding(model)
        first = self._binding.layers[0].weight
        dtype = first.dtype if dtype is None else dtype
        check_dtype(dtype)
        self.model, self.loss = model, loss
        self.device, self.dtype = first.device, dtype
        self.backend = resolve(first, dtype)
        groups, self._group_of = grouped(param_groups, dict(model.named_parameters()), members)
        self.optimizer = StepOptimizer(self, groups, rule, members)
        _leave_to_python()
        #: One rule per param group.
        self._rules = self.optimizer.rules_of_groups(rule)
        self.losses = torch.zeros(0, dtype=torch.promote_types(dtype, torch.float32), device=self.device)
        self._next_losses: list[Tensor] = []
        self._options = loss_options(
            loss,
            self._binding.ends[1],
            {first.dtype, dtype},
            self.losses,
            class_weight=class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            pos_weight=pos_weight,
            delta=delta,
        )
        batches = Batches if members is None else MemberBatches
        self._batches = batches(
            self._binding.ends, STEP_LOSSES[loss], loss, dtype, first.dtype, self.losses, self._options
        )
        self._cuda_graph = cuda_graph
        #: True on the Triton path, where no other code checks the class numbers.
        self._checks_classes = self.backend == "triton"
        self._has_gradients = self._lost_gradients = False
        #: Optimizer state of parameters that are frozen now, by name.
        self._parked: dict[str, Tensor] = {}
        self._on_cpu = self.device.type == "cpu"
        #: Kernels go to the current device; the model's need not be that.
        self._on_device: AbstractContextManager[object] = nullcontext()
        if self.device.type == "cuda":
            self._on_device = torch.cuda.device(self.device)
        self._parallel: DataParallel | None = None
        if process_group is not None:
            from .data_parallel import DataParallel

            self._parallel = DataParallel(process_group, self.device)
            self._parallel.start([*model.parameters(), *model.buffers()], f"{self!r}, dropout={model.dropout}")
        #: Whether the average has still to begin with the parameters.
        self._ema_waits = rule.ema_decay is not None
        self._engine = self._new_engine(self._binding, self._rules)
        self._again = None
        self._take_up_dropout(self._binding)

    @property
    def lr(self) -> float | list[float]:
        """Learning rate of the next step; a list where param groups have different ones. A number sets all groups'."""
        rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        return rates[0] if len(set(rates)) == 1 else rates

    @lr.setter
    def lr(self, value: float) -> None:
        rate = check_setting("lr", value)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and name in self.__dict__:
            raise AttributeError(f"a TrainStep keeps its {name}; make a new TrainStep")
        if name in _SETTINGS:
            raise AttributeError(f"set {name} in step.optimizer.param_groups[0], which a step follows")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        """The model, the optimizer with its settings (without those that are off), loss, dtype and backend."""
        group, sizes = self.optimizer.param_groups[0], "-".join(map(str, self.model.sizes))
        if isinstance(self.model, MLPEnsemble):
            sizes += f" x {self.model.members}"
        on = [name for name in self.rule.settings if group[name] is not None and group[name] is not False]
        settings = ", ".join(f"{name}={group[name]}" for name in on)
        if len(self._rules) > 1:
            own = [", ".join(f"{name}={g[name]}" for name in OWN) for g in self.optimizer.param_groups]
            settings += f", param_groups=[{', '.join(f'({values})' for values in own)}]"
        return (
            f"TrainStep({type(self.model).__name__} {sizes}, {self.rule.name}({settings}), loss={self.loss!r}, "
            f"dtype={self.dtype}, backend={self.backend!r})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """The model, the arguments and the state."""
        if self._parallel is not None:
            raise TypeError(
                "a TrainStep with a process_group cannot be copied or pickled, because a group belongs to its process; "
                "make a new TrainStep and load step.state_dict()"
            )
        groups = self.optimizer.param_groups
        arguments = {name: groups[0][name] for name in self.rule.settings}
        if len(groups) > 1:
            members = [[name for name, of in self._group_of.items() if of == i] for i in range(len(groups))]
            own = [{name: group[name] for name in OWN} for group in groups]
            arguments["param_groups"] = [{"params": m, **o} for m, o in zip(members, own, strict=True)]
        arguments |= {"optimizer": self.rule.name, "loss": self.loss, "dtype": self.dtype}
        arguments |= {"cuda_graph": self._cuda_graph} | vars(self._options)
        state = self.state_dict()
        known = {*self.rule.settings, "params"}
        extra = [{name: value for name, value in group.items() if name not in known} for group in groups]
        return _restored, (self.model, arguments, state, self._parked, extra, self._ema_waits)

    def __call__(self, x: Tensor, y: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """One optimizer step on a batch.

        Args:
            x: [B, sizes[0]] or [B, ...], of the products' or the parameters' dtype, or uint8 pixels. If x shares
                memory with a trained parameter, give a copy: on a CPU, layers are updated before the last read of x.
            y: int64 [B] class numbers in [0, C), or [B, C] values, as the loss takes.
            sample_weight: [B], floating-point, a factor s of each row; default 1. The loss is sum(s l) / sum(s), with
                class weights w sum(s w l) / sum(s w). On a CPU negative weights are a ValueError, and so are weights
                that are all 0. On a GPU such weights are computed with as they are.

        Returns:
            The loss before the step: 0-d, on the device, without waiting for it; a tensor of its own. On a CPU an
            out-of-range class number raises IndexError before anything changes. On a GPU it makes the loss NaN; without
            the kernels (backend "torch") it is a device-side assertion of torch's. The loss of an empty batch is NaN,
            and such a step changes nothing.
        """
        again, binding = self._again, self._binding
        # A batch like the last one, and nothing has changed. torch's guards, which compare the batch, cannot take
        # nested tensors, and see neither FakeTensorMode nor inference mode.
        try:
            repeats = (
                again is not None
                and sample_weight is None
                and binding.is_in_place()
                and not (x.is_nested or y.is_nested)
                and self._is_repeated(x, y, *binding.all)
                and fake_mode() is None
                and not is_inference_mode_enabled()
                and self.optimizer.is_unchanged()
            )
        except AttributeError:  # no tensor
            repeats = False
        if repeats:
            loss = self._next_loss()
            if again(x, y, loss):  # type: ignore[misc]
                _increment_version(binding.parameters)
                return loss
        self._follow()
        x, y = self._batches.checked(x, y, in_range=self._checks_classes)
        if sample_weight is not None:
            sample_weight = self._batches.checked_weight(sample_weight, x.shape[-2])
        loss = self._next_loss()
        if x.shape[-2] == 0:
            if self._parallel is not None:
                raise ValueError("expected at least one row in every process of the process_group, got none")
            loss.fill_(float("nan"))
        elif self._on_cpu:
            self._train(x, y, loss, sample_weight)
        else:
            with self._on_device:
                self._train(x, y, loss, sample_weight)
        self.forget_gradients()
        return loss

    def _train(self, x: Tensor, y: Tensor, loss: Tensor, weight: Tensor | None) -> None:
        """One step on a batch that has rows and was checked."""
        if self._ema_waits:
            self._begin_ema()
        if weight is None:
            again = self._engine.step(x, y, loss)
            if again is not None and self._batches.repeats:
                self._again, self._is_repeated = again, guards([x, y, *self._binding.all])
        else:
            self._engine.step(x, y, loss, weight=weight)
        self._updated()

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        order: Tensor | None = None,
        lr_factors: Any = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """One pass over device-resident data, one step for each ``batch_size`` rows.

        Args:
            images: [N, sizes[0]] or [N, ...], uint8 or floating point, on the model's device.
            labels: int64 [N] (or values or probabilities [N, C]), on the same device.
            batch_size: rows of a step; the last step takes what is left.
            order: int64 [n], the rows in the order of use; default all rows in order. On a CPU a row out of range is
                an IndexError. On a GPU it makes its step's loss NaN, and the nearest row takes its place.
            lr_factors: a sequence, one factor of ``lr`` (of every param group's) for each step; default all 1.
            sample_weight: [N], the weight of each row of the data, as ``step(x, y, sample_weight)`` takes them. A batch
                whose weights are all 0 is a ValueError on a CPU.

        Returns:
            The mean loss of the n rows, each at the parameters of its step: 0-d float32 on the device. A row counts
            with its step's loss, whatever its weight is. ``losses`` has the loss of each step.
        """
        self._follow()
        images, labels = self._batches.checked(images, labels, in_range=True)
        batch_size = check_batch_size(batch_size)
        order = self._batches.checked_order(order, images)
        n = order.shape[-1]
        if sample_weight is not None:
            sample_weight = self._batches.checked_weight(sample_weight, images.shape[-2])
        steps = -(-n // batch_size)
        lrs = self._learning_rates(lr_factors, steps)
        full, last = batch_size, n - (steps - 1) * batch_size
        if self._parallel is not None:
            full, last, n = self._parallel.check_epoch(steps, batch_size, n, last)
        self.forget_gradients()
        each = self.losses.shape[1:]
        self.losses = losses = torch.full((steps, *each), float("nan"), dtype=self.losses.dtype, device=self.device)
        if not steps:
            return torch.full(each, float("nan"), dtype=torch.float32, device=self.device)
        if self._ema_waits:
            self._begin_ema()
        with self._on_device:
            order, outside = self._batches.readable(order, images, batch_size)
            if sample_weight is not None:
                self._batches.check_weighed(sample_weight, order, batch_size)
            self._engine.epoch(images, labels, batch_size, order, lrs, losses, **_given(weight=sample_weight))
            if outside is not None:
                losses.masked_fill_(outside, float("nan"))
            self._updated()
            return ((losses[:-1].sum(0) * full + losses[-1] * last) / n).float()

    def _learning_rates(self, factors: Any, steps: int) -> Tensor:
        """Of every step, float64 on the host."""
        return learning_rates([rule.lr for rule in self._rules], factors, steps)

    def gradients(
        self, x: Tensor, y: Tensor, *, accumulate: bool = False, sample_weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Gradients of the mean loss by parameter name, in float32 or wider; the parameters stay as they are.

        ``sample_weight`` is as that of a step.

        With float16 products a gradient that the loss scale makes too large for them is infinite, until ``update``
        has lowered the scale.

        The tensors are the step's own buffers, valid until the next call of the step. ``accumulate=True`` adds to the
        gradients that were computed since the last update; ``update`` then applies the optimizer to them:

            step.gradients(x1, y1)
            step.gradients(x2, y2, accumulate=True)
            step.update()

        Raises:
            ValueError: an empty batch, whose mean loss has no gradient; and what a step raises.
        """
        self._follow()
        x, y = self._batches.checked(x, y, in_range=self._checks_classes)
        if accumulate and self._lost_gradients:
            raise RuntimeError(
                "the gradients so far were lost when the model or the settings changed; begin with accumulate=False"
            )
        if x.shape[-2] == 0:
            raise ValueError("expected at least one row; the mean loss of an empty batch has no gradient")
        if sample_weight is not None:
            sample_weight = self._batches.checked_weight(sample_weight, x.shape[-2])
        adds = accumulate and self._has_gradients
        with self._on_device:
            grads = self._engine.gradients(x, y, self._next_loss(), accumulate=adds, **_given(weight=sample_weight))
        self._has_gradients, self._lost_gradients = True, False
        return dict(zip(self._binding.trained, grads, strict=True))

    def update(self) -> None:
        """Apply the optimizer (and clipping, if asked for) to the gradients that ``gradients`` computed.

        Raises:
            RuntimeError: there are none since the last step or update, or since parameters were frozen or thawed.
        """
        self._follow()
        if not self._has_gradients:
            raise RuntimeError("there are no gradients to apply; call gradients(x, y) before update()")
        self.forget_gradients()
        with self._on_device:
            if self._ema_waits:
                self._begin_ema()
            self._engine.update()
        self._updated()

    def _next_loss(self) -> Tensor:
        """A tensor for a loss that nobody else has, without an allocation at each step."""
        if not self._next_losses:
            block = torch.empty((_BLOCK, *self.losses.shape[1:]), dtype=self.losses.dtype, device=self.device)
            # Not views, so that each loss has a version counter of its own, as other tensors have.
            with torch._C._AutoDispatchBelowADInplaceOrView():
                self._next_losses = list(block.unbind())
        return self._next_losses.pop()

    def _updated(self) -> None:
        """Tell autograd that the parameters changed, and torch's schedulers that an update came before theirs."""
        _increment_version(self._binding.parameters)
        if self._ema_waits:
            self._ema_waits = False
        self._engine.updated()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]


@cache
def _leave_to_python() -> None:
    """Have torch.compile trace no method of a step: a graph would lose that the versions of parameters rise.

    Functions that the methods call may still be traced, each by itself.
    """
    from torch._dynamo.decorators import skip  # loaded by now, by torch.optim.Optimizer

    for each in (StatefulStep, TrainStep, TrainStep._of_ensemble, StepOptimizer, Binding, Batches, MemberBatches):
        for function in filter(inspect.isfunction, vars(each).values()):
            skip(function)


def arguments() -> dict[str, inspect.Parameter]:
    """The arguments of ``TrainStep``, the model first."""
    _, *own, _others = inspect.signature(TrainStep.__init__).parameters.items()
    return dict(own)


def _given(**arguments: Any) -> dict[str, Any]:
    """Those arguments that are not None."""
    return {name: value for name, value in arguments.items() if value is not None}


def _restored(
    model: MLP,
    arguments: dict[str, Any],
    state: dict[str, Tensor],
    parked: dict[str, Tensor],
    extra: list[dict[str, Any]],
    ema_waits: bool,
) -> TrainStep:
    """The copy that ``TrainStep.__reduce__`` describes."""
    step = TrainStep(model, **arguments)
    step.load_state_dict(state)
    step._parked, step._ema_waits = parked, ema_waits
    for group, kept in zip(step.optimizer.param_groups, extra, strict=True):
        group.update(kept)  # what schedulers keep there
    return step
