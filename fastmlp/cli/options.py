"""The options of ``fastmlp train`` that come from the arguments of `fastmlp.TrainStep`.

Each setting of a rule of ``fastmlp.step.optimizers`` has an option, and each argument that is about the loss. A new
rule, a new setting, or a new argument has its option without a change here; `_HELP` may say more of it.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fastmlp.base.losses import LOSSES, STEP_LOSSES
from fastmlp.step.groups import OWN
from fastmlp.step.optimizers import OPTIMIZERS, Optimizer, check_setting
from fastmlp.train.engines import step_options, usual_rule

from . import common

if TYPE_CHECKING:
    import torch

Command = TypeVar("Command", bound=Callable[..., Any])

_HELP = {
    "momentum": "Momentum.",
    "weight_decay": "Weight decay.",
    "nesterov": "Nesterov's or plain momentum.",
    "betas": "Decay rates of the means of the gradients and of their squares.",
    "eps": "What is added to the denominator.",
    "alpha": "Decay rate of the mean of the gradients' squares.",
    "amsgrad": "Divide by the largest mean so far, or by the latest.",
    "centered": "Divide by a standard deviation, or by the root of the mean square.",
    "maximize": "Go up the gradient of the loss, or down.",
    "max_grad_norm": "Most that the 2-norm of all gradients together may be.",
    "class_weight": "Factors of the rows of each class, such as 1,1,5.",
    "ignore_index": "Class number of rows that do not count.",
    "label_smoothing": "Share of each target that is spread over all classes.",
    "pos_weight": "Factors of the terms with y of each output, such as 1,5.",
    "ema_decay": "Keep a moving average of the parameters with this decay, such as 0.999, and judge and keep it.",
    "ema_warmup": "Average over fewer steps at the beginning.",
    "delta": "Distance at which the loss huber becomes linear.",
}
#: Arguments of TrainStep whose options are no numbers (`kernel_options`), or that torchrun gives.
_OTHERS = ("dtype", "cuda_graph", "param_groups", "process_group")
#: The options of `kernel_options` by parameter, with their defaults.
STEP: dict[str, Any] = {"param_group": (), "product_dtype": None, "cuda_graph": True}
#: Dtypes of products beside the parameters' own.
PRODUCTS = ("float16", "bfloat16")


class ParamGroup(click.ParamType):
    """Parameters by name, with settings of their own: ``*.bias:weight-decay=0``, ``layers.0.*,*.bias:lr=0.1``."""

    name = "group"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text; a usage error if it is no group."""
        try:
            param_group(value)
        except (TypeError, ValueError) as error:
            self.fail(str(error), param, ctx)
        return str(value)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """What the help shows for a group."""
        return "NAMES:SETTINGS"


def param_group(text: str) -> dict[str, Any]:
    """A group of ``TrainStep(param_groups=[...])`` from the text of an option; ValueError for another text."""
    names, colon, rest = text.partition(":")
    patterns = [name.strip() for name in names.split(",")]
    own: dict[str, Any] = {}
    for part in rest.split(","):
        name, equals, number = part.partition("=")
        name = name.strip().replace("-", "_")
        if not (colon and equals and all(patterns)) or name not in OWN or name in own:
            raise ValueError(
                f"{text!r} is no group of parameters; expected names or patterns of names, a colon, and "
                f"{' or '.join(map(option_name, OWN))} or both, such as '*.bias:weight-decay=0' or '*.bias:lr=0.1'"
            )
        try:
            own[name] = check_setting(name, float(number))
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from error
    return {"params": patterns, **own}


def defaults(rule: type[Optimizer]) -> dict[str, Any]:
    """What a rule takes for settings that are not given, without the learning rate."""
    fields = {field.name: field.default for field in dataclasses.fields(rule)}
    return {name: value for name, value in {**fields, **rule.usual}.items() if name != "lr" and name not in _OTHERS}


def settings() -> dict[str, dict[str, Any]]:
    """The settings of all rules by name, each with its default by the rules that have it."""
    found: dict[str, dict[str, Any]] = {}
    for name, rule in OPTIMIZERS.items():
        for setting, value in defaults(rule).items():
            found.setdefault(setting, {})[name] = value
    return found


def option_name(name: str) -> str:
    """A parameter's name on the command line."""
    return name.replace("_", "-")


def option_of(name: str, value: Any = None) -> str:
    """A parameter as the command line has it: ``--weight-decay 0.1``, or without a value ``--weight-decay``."""
    flag = option_name(name)
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, (tuple, list)) and value and all(isinstance(part, str) for part in value):
        return " ".join(f"--{flag} {shlex.quote(part)}" for part in value)
    return f"--{flag}" if value is None else f"--{flag} {shown(value)}"


def shown(value: Any) -> str:
    """A value as the command line and the help have it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (tuple, list)):
        return ("-" if all(isinstance(part, int) for part in value) else " ").join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def optimizer_options(but: Iterable[str] = ()) -> Callable[[Command], Command]:
    """One option per setting of the rules, ``but`` some. The default of each is None, which means the rule's own."""

    def add(command: Command) -> Command:
        for name, rules in reversed(settings().items()):
            if name not in but:
                command = _option(name, rules)(command)
        return command

    return add


def _option(name: str, rules: Mapping[str, Any]) -> Callable[[Command], Command]:
    sample = next(iter(rules.values()))
    values: dict[str, list[str]] = {}
    for rule, value in rules.items():
        values.setdefault(shown(value), []).append(rule)
    if len(rules) == len(OPTIMIZERS) and len(values) == 1:
        default = f"default: {next(iter(values))}"
    else:
        default = "; ".join(f"{', '.join(names)}: {value}" for value, names in values.items())
    text = f"{_HELP.get(name, f'{name.capitalize()}.'.replace('_', ' '))}  [{default}]"
    flag = option_of(name)
    if isinstance(sample, bool):
        return click.option(f"{flag}/--no-{flag[2:]}", default=None, help=text)
    if isinstance(sample, tuple):
        return click.option(flag, type=_number(name, sample), nargs=len(sample), help=text)
    return click.option(flag, type=_number(name, None), help=text)


def _number(name: str, sample: tuple[float, ...] | None) -> common.Number:
    """The numbers that `check_setting` allows, from trying it at -1, 0 and 1."""

    def allows(value: float) -> bool:
        try:
            check_setting(name, value if sample is None else (value,) * len(sample))
        except ValueError:
            return False
        return True

    least = -math.inf if allows(-1.0) else 0.0
    return common.Number(least, math.inf if allows(1.0) else 1.0, least_is_open=not allows(0.0))


def loss_settings() -> dict[str, tuple[str, Any]]:
    """The arguments of TrainStep that are no settings of a rule: by name, the kind and the default."""
    found = {}
    for name, parameter in step_options().items():
        kind = str(parameter.annotation).partition(" | ")[0]
        if name not in _OTHERS and kind in ("bool", "int", "float", "Tensor"):
            found[name] = kind, parameter.default
    return found


def loss_options(command: Command) -> Command:
    """One option for each of `loss_settings`. The default of each is None, which means that of TrainStep."""
    types = {"int": click.INT, "float": common.Number(-math.inf), "Tensor": common.Numbers()}
    for name, (kind, default) in reversed(loss_settings().items()):
        flag = option_of(name)
        text = f"{_HELP.get(name, f'{name.capitalize()}.'.replace('_', ' '))}  [default: {shown(default)}]"
        if kind == "bool":
            command = click.option(f"{flag}/--no-{flag[2:]}", default=None, help=text)(command)
        else:
            command = click.option(flag, type=types[kind], help=text)(command)
    return command


def kernel_options(command: Command) -> Command:
    """The options of `STEP`."""
    for option in (
        click.option(
            "--param-group",
            type=ParamGroup(),
            multiple=True,
            help="Parameters with a --lr or --weight-decay of their own, such as '*.bias:weight-decay=0' for no "
            "decay on biases; may be given several times.",
        ),
        click.option(
            "--product-dtype",
            type=common.Choice(PRODUCTS),
            help="Dtype of the products in the training, with parameters in float32 (mixed precision).  "
            "[default: that of the parameters]",
        ),
        click.option(
            "--cuda-graph/--no-cuda-graph",
            default=STEP["cuda_graph"],
            help="Capture the steps in CUDA graphs, or launch each kernel.  [default: on]",
        ),
    )[::-1]:
        command = option(command)
    return command


def step_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of TrainStep that the options of `STEP` ask for, without those at their defaults."""
    import torch

    options = {**STEP, **options}
    arguments: dict[str, Any] = {}
    if options["param_group"]:
        arguments["param_groups"] = [param_group(text) for text in options["param_group"]]
    if options["product_dtype"] is not None:
        arguments["dtype"] = getattr(torch, options["product_dtype"])
    if not options["cuda_graph"]:
        arguments["cuda_graph"] = False
    return arguments


def checked_loss_settings(loss: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the loss that are given; UserError for one that the loss does not have."""
    has = getattr(LOSSES[STEP_LOSSES[loss]], "options", ())
    values = {name: value for name, value in given.items() if value is not None}
    for name in values:
        if name not in has:
            raise common.UserError(f"--loss {loss} has no {option_of(name)}")
    return values


def loss_tensors(values: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Those options of the loss that are tensors in Python."""
    import torch

    found = {name: value for name, value in values.items() if isinstance(value, (tuple, list))}
    return {name: torch.tensor(value, dtype=dtype, device=device) for name, value in found.items()}


def named_as_options(text: str, names: Iterable[str]) -> str:
    """A message of the library with the options of these arguments in place of their names."""
    for name in names:
        text = text.replace(name, option_of(name))
    return text


def checked_settings(optimizer: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a rule but the learning rate, from those that are given; UserError for one of another rule."""
    own = defaults(OPTIMIZERS[optimizer])
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in own:
            has = ", ".join(option_of(setting) for setting in own)
            raise common.UserError(f"--optimizer {optimizer} has no {option_of(name)}; it has --lr, {has}")
    if given.get("nesterov") and given.get("momentum") == 0:
        raise common.UserError("--nesterov needs a --momentum above 0")
    with common.user_errors((ValueError, TypeError)):
        rule = usual_rule(lr=1.0, optimizer=optimizer, **given)
    return {name: getattr(rule, name) for name in own}
