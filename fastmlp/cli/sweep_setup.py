"""From the options of ``fastmlp sweep`` to a sweep that is ready to train: data, members and groups."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastmlp.step.optimizers import OPTIMIZERS
from fastmlp.train.scores import takes_values, tensors

from . import common
from .inputs import DEFAULT_SHARE, FASHION_MNIST, Format, check_sizes
from .options import (
    checked_loss_settings,
    checked_settings,
    loss_settings,
    loss_tensors,
    named_as_options,
    settings,
    step_arguments,
)
from .ranks import Ranks
from .train_setup import VALUES_LR

if TYPE_CHECKING:
    import torch

    from fastmlp.data.load import Samples
    from fastmlp.train.sweep.plan import Data, Member, Training

#: Options that say where results go, and not what they are.
_PLACES = ("out", "overwrite", "group")


@dataclass
class Sweep:
    """A sweep that is ready to train.

    Attributes:
        config: the options, as the plan has them.
        form: what every member takes and gives; its standardization is that of all rows.
        train, test: the data as they were loaded.
        fingerprint: of the training data.
    """

    config: dict[str, Any]
    training: Training
    members: list[Member]
    data: Data
    form: Format
    train: Samples
    test: Samples | None
    device: torch.device
    backend: str
    fingerprint: str


def config_of(options: dict[str, Any]) -> dict[str, Any]:
    """The options as the plan keeps them, in JSON's types; the path of the data does not depend on the folder."""
    from fastmlp.data.load import BUNDLED, DEFAULT, TORCHVISION

    kept = {name: value for name, value in options.items() if name not in _PLACES}
    data = kept["data"]
    if data not in (None, DEFAULT, BUNDLED) and not data.startswith(TORCHVISION):
        kept["data"] = os.path.abspath(os.path.expanduser(data)) if os.path.exists(os.path.expanduser(data)) else data
    config: dict[str, Any] = json.loads(json.dumps(kept))
    return config


def prepared(config: dict[str, Any], ranks: Ranks) -> Sweep:
    """The data and the members; UserError for what does not fit together."""
    import torch

    import fastmlp
    from fastmlp.data import Standardization
    from fastmlp.data.load import BUNDLED, DEFAULT
    from fastmlp.train.initial import LEARNING_RATES
    from fastmlp.train.scores import checked
    from fastmlp.train.state import fingerprint
    from fastmlp.train.sweep.plan import AXES, Data, Training, members_of

    loss, optimizer, dtype = config["loss"], config["optimizer"], getattr(torch, config["dtype"])
    shapes = [tuple(sizes) for sizes in config["sizes"]]
    if config["folds"] is not None and config["validation"] is not None:
        raise common.UserError("--folds holds out each part in turn, so --validation has no rows; give one of the two")
    if len(set(shapes)) < len(shapes):
        raise common.UserError("--sizes has the same sizes twice; expected different shapes")
    own = {field.name for field in dataclasses.fields(OPTIMIZERS[optimizer])}
    given = {name: config[name] for name in settings() if name not in AXES and config.get(name) is not None}
    largest = {name: max(config[name]) for name in ("momentum", "weight_decay") if config[name]}
    checked_settings(optimizer, {**given, **largest})
    of_loss = checked_loss_settings(loss, {name: config.get(name) for name in loss_settings()})
    of_step = step_arguments(config)
    if config["data"] in (None, DEFAULT, BUNDLED):
        for sizes in shapes:
            check_sizes(sizes, "--sizes", FASHION_MNIST)
    device = ranks.device_of(common.select_device(config["device"]))
    backend = common.select_backend(config["backend"], device, of_step.get("dtype", dtype))
    train, test = common.load_data(config["data"], device, loss)
    form = Format.of(train, loss)
    shapes = shapes or [form.sizes]
    for sizes in shapes:
        check_sizes(sizes, "--sizes", form)
    x, y = tensors(train)
    if takes_values(loss):
        y = y.to(torch.promote_types(dtype, torch.float32))

    def lr_of(sizes: tuple[int, ...], activation: str) -> float:
        values = min(VALUES_LR, 1 / sizes[-2])
        usual = values if takes_values(loss) else LEARNING_RATES[activation]
        return float(OPTIMIZERS[optimizer].usual.get("lr", usual))

    def prepare(rows: torch.Tensor) -> Any:
        return partial(Standardization.__call__, Standardization.of(rows), dtype=dtype)

    share = None
    if config["folds"] is None:
        share = DEFAULT_SHARE if config["validation"] is None else config["validation"]
    weight = getattr(train, "sample_weight", None)
    data = Data(x, y, share, config["folds"], None if form.standardization is None else prepare, weight)
    usual = OPTIMIZERS[optimizer].usual.get("momentum", 0.0) if "momentum" in own else None
    axes = {
        "sizes": shapes,
        "activation": config["activation"],
        "lr": config["lr"] or (),
        "momentum": config["momentum"] or (usual,),
        "weight_decay": config["weight_decay"] or (0.0,),
        "dropout": config.get("dropout") or (0.0,),
        "seed": config["seeds"],
        "fold": (None,) if config["folds"] is None else range(config["folds"]),
    }
    names = ("epochs", "batch_size", "optimizer", "loss", "schedule", "warmup")
    options = {**of_loss, **loss_tensors(of_loss, dtype, device), **of_step}
    training = Training(dtype=dtype, settings=given, options=options, **{name: config[name] for name in names})
    try:
        data.divided(0, None if data.folds is None else 0)
    except ValueError as error:
        raise common.UserError(f"--{'validation' if data.folds is None else 'folds'}: {error}") from error
    members = members_of(axes, lr_of)
    with common.user_errors():
        for member in members:
            training.rule(member)
        for sizes in shapes:
            model = fastmlp.MLP(sizes, config["activation"][0], device=device, dtype=dtype)
            inputs = form.transformed(x[:1], dtype, f"the data {train.source}").expand(len(x), -1)
            checked(model, (inputs, y), loss, of_loss.get("ignore_index"))
            try:
                fastmlp.TrainStep(fastmlp.MLPEnsemble.stack([model]), loss=loss, **options)
            except common.INPUT_ERRORS as error:
                raise common.UserError(named_as_options(str(error), of_loss)) from error
    known = fingerprint(x, y) if weight is None else f"{fingerprint(x, y)}, weights {fingerprint(weight, weight)}"
    return Sweep(config, training, members, data, form, train, test, device, backend, known)


def groups_of(ready: Sweep, most: int | None, ranks: Ranks) -> list[list[int]]:
    """The members of each group: ``most`` at most, or as many as half of the free memory takes."""
    from fastmlp.train.sweep.plan import MOST_MEMBERS, free_bytes, grouped

    if most is not None:
        return grouped(ready.members, ready.data, ready.training, float("inf"), most)
    sharing = ranks.local_count if ready.device.type == "cpu" else 1
    room = free_bytes(ready.device) / 2 / sharing
    return grouped(ready.members, ready.data, ready.training, room, MOST_MEMBERS, ranks.count)
