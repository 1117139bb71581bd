"""``fastmlp eval``: loss and accuracy, or R2, of a checkpoint on test data."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from . import common
from .inputs import Format


@click.command("eval", short_help="Evaluate a checkpoint on the test data.")
@click.argument("checkpoint", type=common.Folder())
@common.data_option
@common.machine_options
@common.json_option
def command(checkpoint: str, data: str | None, device: str, backend: str, as_json: bool) -> int:
    """Evaluate CHECKPOINT (a run folder or its model file) on the test data of FashionMNIST, or of --data.

    A model that was trained on torchvision:NAME is evaluated on the same without --data. Models of other data need
    --data: the data of their training, or others of the same form. All rows count where the data have no test set.
    """
    from fastmlp.train import evaluate
    from fastmlp.train.scores import metric_of

    used_device = common.select_device(device)
    model, config = common.load_model(checkpoint, used_device)
    form = Format.of_checkpoint(config, model.sizes, checkpoint)
    dtype = next(model.parameters()).dtype
    used_backend = common.select_backend(backend, used_device, dtype)
    named = config.get("data")
    source = named if data is None and isinstance(named, str) else data
    if source is None and not form.is_fashion_mnist:
        raise common.UserError(f"the checkpoint {checkpoint} is not of FashionMNIST; name its data with --data")
    train, test = common.load_data(source, used_device, form.loss)
    all_rows = test is None
    test = form.fitted(train if test is None else test, dtype)
    if all_rows:
        common.say("warning", f"{train.source} has no test set; all its rows are evaluated")
    start = time.perf_counter()
    with common.user_errors():
        loss, score = evaluate(model, test, loss=form.loss, ignore_index=_ignored(config))
    seconds = time.perf_counter() - start
    metric = metric_of(form.loss)
    if not as_json:
        shown = f"test accuracy {100 * score:.2f} %, " if metric == "accuracy" and score is not None else ""
        shown += f"test R2 {score:.4f}, " if metric == "r2" and score is not None else ""
        click.echo(f"data: {test.source}\n{shown}test loss {loss:.4f}")
        return 0
    result = {
        f"test_{metric}": score,
        "test_loss": loss,
        "images": len(test),
        "seconds": seconds,
        "images_per_second": len(test) / seconds,
        "device": str(used_device),
        "backend": used_backend,
        "dataset": test.published,
        "checkpoint": checkpoint,
        "config": {key: config[key] for key in ("sizes", "activation", "dtype")},
        "versions": common.versions(),
    }
    click.echo(json.dumps(result))
    return 0


def _ignored(config: dict[str, Any]) -> int | None:
    """The class number of rows that did not count in the training, and so do not count here."""
    training = config.get("training")
    number = training.get("ignore_index") if isinstance(training, dict) else None
    return number if isinstance(number, int) else None
