"""``fastmlp eval``: loss and accuracy of a checkpoint on FashionMNIST's test images."""

from __future__ import annotations

import json
import time

import click

from . import common


@click.command("eval", short_help="Evaluate a checkpoint on the test images.")
@click.argument("checkpoint", type=common.Folder())
@common.data_option
@common.machine_options
@common.json_option
def command(checkpoint: str, data: str | None, device: str, backend: str, as_json: bool) -> int:
    """Evaluate CHECKPOINT (a run folder or its model file) on FashionMNIST's test images."""
    from fastmlp.train import evaluate

    used_device = common.select_device(device)
    model, config = common.load_model(checkpoint, used_device)
    common.check_sizes(model.sizes, f"the checkpoint {checkpoint} has sizes")
    used_backend = common.select_backend(backend, used_device, next(model.parameters()).dtype)
    test = common.load_data(data, used_device)[1]
    start = time.perf_counter()
    loss, accuracy = evaluate(model, test)
    seconds = time.perf_counter() - start
    if not as_json:
        click.echo(f"data: {test.source}\ntest accuracy {100 * accuracy:.2f} %, test loss {loss:.4f}")
        return 0
    result = {
        "test_accuracy": accuracy,
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
