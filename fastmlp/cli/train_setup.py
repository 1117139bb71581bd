"""From the options of ``fastmlp train`` to a run that is ready to start: data, model and the arguments of `fit`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastmlp.step.optimizers import OPTIMIZERS
from fastmlp.train.scores import takes_values

from . import common
from .inputs import FASHION_MNIST, Format, check_sizes, divided, share_of
from .options import (
    STEP,
    checked_loss_settings,
    checked_settings,
    loss_settings,
    loss_tensors,
    named_as_options,
    option_of,
    settings,
    step_arguments,
)
from .progress import device_name
from .ranks import Ranks
from .resuming import load_run, options_of, resumed
from .run_folder import check_run_folder

if TYPE_CHECKING:
    import torch

    from fastmlp.data.load import Samples
    from fastmlp.nn import MLP
    from fastmlp.train.state import RunState

#: The largest default learning rate for values. The curvature of such a loss grows with the width of the last hidden
#: layer, so the default is 1 / width.
VALUES_LR = 0.05


@dataclass
class Ready:
    """A run that is ready to start.

    Attributes:
        options: of the command, those of the run to resume included.
        model: with its starting weights.
        form: what the model takes and gives.
        train, held_out, test: the data.
        arguments: of `fit`, in JSON's types.
        objects: arguments of `fit` that JSON cannot hold. They take the place of those of the same name in
            ``arguments``.
        config: what a reader of the results wants to know: the arguments of the model, of `fit` and of the step.
        about: what the results say of device, data and versions.
        entries: of the checkpoint's configuration.
        kept: what the state keeps of the options.
        state, read_at: of the run to resume, and which file it was.
    """

    options: dict[str, Any]
    model: MLP
    form: Format
    train: Samples
    held_out: Samples | None
    test: Samples | None
    device: torch.device
    backend: str
    arguments: dict[str, Any]
    objects: dict[str, Any]
    config: dict[str, Any]
    about: dict[str, Any]
    entries: dict[str, Any]
    kept: dict[str, Any]
    state: RunState | None = None
    read_at: os.stat_result | None = None

    @property
    def parts(self) -> list[Any]:
        """The data that there are."""
        return [part for part in (self.train, self.held_out, self.test) if part is not None]

    @property
    def name(self) -> str:
        """Of a new run folder."""
        sizes = "-".join(map(str, self.config["sizes"]))
        return f"{sizes}-{self.config['activation']}-seed{self.options['seed']}"


def prepared(options: dict[str, Any], resume: str | None, given: Mapping[str, Any], ranks: Ranks) -> Ready:
    """Load the data and make the model; UserError for what does not fit together.

    Args:
        options: the values of all options of the run.
        resume: the folder of ``--resume``.
        given: the options among them that the command line or a file gives.
        ranks: the processes that divide the batches.
    """
    state: RunState | None = None
    read_at: os.stat_result | None = None
    if resume is not None:
        read_at, state = load_run(Path(resume))
        options = resumed(Path(resume), state, options, given)
    elif options["out"] is not None:
        check_run_folder(Path(options["out"]), options["overwrite"])

    import torch

    import fastmlp
    from fastmlp.data.load import BUNDLED, DEFAULT, TORCHVISION
    from fastmlp.train.engines import check_shares, torch_optimizer_class
    from fastmlp.train.initial import LEARNING_RATES, initialize_
    from fastmlp.train.logs import check_tensorboard
    from fastmlp.train.scores import checked
    from fastmlp.train.scores import tensors as tensors_of

    sizes, loss, optimizer, data = (options[name] for name in ("sizes", "loss", "optimizer", "data"))
    activation, engine = options["activation"], options["engine"]
    if sizes is not None and data in (None, DEFAULT, BUNDLED):
        check_sizes(sizes, "--sizes", FASHION_MNIST)
    rule = checked_settings(optimizer, {name: options[name] for name in settings()})
    of_loss = checked_loss_settings(loss, {name: options[name] for name in loss_settings()})
    engine = engine or "step"
    if engine == "autograd" and torch_optimizer_class(optimizer) is None:
        raise common.UserError(f"--optimizer {optimizer} needs --engine step")
    if engine == "autograd" and rule["ema_decay"] is not None:
        raise common.UserError("--ema-decay needs --engine step")
    if options["log"] == "tensorboard":
        with common.user_errors((ModuleNotFoundError,)):
            check_tensorboard()
    if ranks.count > 1 and engine != "step":
        raise common.UserError(f"--engine {engine} trains in one process; leave out torchrun, or take --engine step")
    device = ranks.device_of(common.select_device(options["device"]))
    dtype: torch.dtype = getattr(torch, options["dtype"])
    of_step, said = step_arguments(options), {name: options[name] for name in STEP if options[name] != STEP[name]}
    backend = common.select_backend(options["backend"], device, of_step.get("dtype", dtype))
    train, test = common.load_data(data, device, loss)
    share = share_of(test, options["validation"])
    if options["patience"] is not None and not share:
        raise common.UserError(
            "--patience needs held-out rows to judge the epochs by; add --validation 0.1, or another share"
        )
    train, held_out = divided(train, share, options["seed"])
    try:
        check_shares(options["batch_size"], len(tensors_of(train)[1]), ranks.count)
    except ValueError as error:
        raise common.UserError(named_as_options(str(error), ("batch_size",))) from error
    form = Format.of(train, loss)
    sizes = form.sizes if sizes is None else tuple(sizes)
    check_sizes(sizes, "--sizes", form)
    lr = options["lr"]
    if lr is None:
        values_lr = min(VALUES_LR, 1 / sizes[-2])
        lr = OPTIMIZERS[optimizer].usual.get("lr", values_lr if takes_values(loss) else LEARNING_RATES[activation])
    arguments = {"lr": lr, "loss": loss, "engine": engine, "optimizer": optimizer}
    arguments |= {name: options[name] for name in ("epochs", "batch_size", "schedule", "warmup")}
    arguments |= {**rule, **of_loss, "patience": options["patience"], "seed": options["seed"]}
    train = form.fitted(train, dtype)
    held_out, test = (None if part is None else form.fitted(part, dtype) for part in (held_out, test))
    parts = [part for part in (train, held_out, test) if part is not None]
    with common.user_errors():
        try:
            model = fastmlp.MLP(sizes, activation, device=device, dtype=dtype, dropout=options["dropout"])
        except (RuntimeError, MemoryError) as error:
            if not common.is_out_of_memory(error):
                raise
            raise common.UserError(f"{device} has no memory for such a network; use smaller --sizes") from error
        for part in parts:
            checked(model, part, loss, of_loss.get("ignore_index"))
        objects: dict[str, Any] = {**loss_tensors(of_loss, dtype, device), **of_step}
        if of_loss or of_step:
            if engine != "step":
                raise common.UserError(f"{option_of([*of_loss, *said][0])} needs --engine step")
            try:
                fastmlp.TrainStep(model, loss=loss, **{**of_loss, **objects})
            except common.INPUT_ERRORS as error:
                raise common.UserError(named_as_options(str(error), of_loss)) from error
    initialize_(model, options["seed"])

    model_config = {"sizes": list(sizes), "activation": activation, "bias": True, "dtype": options["dtype"]}
    model_config |= {"dropout": options["dropout"]} if options["dropout"] else {}
    about: dict[str, Any] = {
        "device": str(device),
        "device_name": device_name(device),
        "backend": backend,
        "dataset": train.published,
        "test_dataset": None if test is None else test.published,
        "versions": common.versions(),
    }
    if held_out is not None:
        about["validation_dataset"] = held_out.published
    entries = {**model_config, **form.as_config(), "training": {**arguments, **said, **about}}
    if data == BUNDLED or (data is not None and data.startswith(TORCHVISION) and "@" not in data):
        entries["data"] = data
    kept = options_of(options, {**model_config, **arguments}, device.type, backend, share)
    return Ready(
        options, model, form, train, held_out, test, device, backend, arguments, objects,
        {**model_config, **arguments, **said}, about, entries, kept, state, read_at,
    )  # fmt: skip
