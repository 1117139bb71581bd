"""``fastmlp predict``: what a checkpoint sees in image files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from . import common

TOP = 3


@click.command("predict", short_help="Classify image files with a checkpoint.")
@click.argument("checkpoint")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--invert/--no-invert",
    default=None,
    help="Exchange light and dark, or do not.  [default: if the border is bright; the data are light on black]",
)
@common.machine_options
@common.json_option
def command(
    checkpoint: str, images: tuple[str, ...], invert: bool | None, device: str, backend: str, as_json: bool
) -> int:
    """Classify IMAGE files with CHECKPOINT (a run folder or its model file).

    Images of any size are taken, in gray or colour, in any format that pillow reads. Margins are cut, the longest edge
    is fitted to 28 pixels, and transparent parts count as background.
    """
    import torch

    from fastmlp.data.fashion_mnist import CLASSES
    from fastmlp.data.images import load_image

    used_device = common.select_device(device)
    model, _ = common.load_model(checkpoint, used_device)
    common.check_sizes(model.sizes, f"the checkpoint {checkpoint} has sizes")
    common.select_backend(backend, used_device, next(model.parameters()).dtype)
    with common.user_errors():
        loaded = [load_image(Path(image), invert) for image in images]
    pixels = torch.stack([image.pixels for image in loaded]).to(used_device)
    with torch.no_grad():
        probabilities = torch.softmax(model(pixels).float(), dim=1).cpu()
    top = probabilities.topk(TOP, dim=1)
    results: list[dict[str, Any]] = [
        {
            "file": name,
            "inverted": image.inverted,
            "predictions": [
                {"class": CLASSES[label], "label": label, "probability": probability}
                for probability, label in zip(values, labels, strict=True)
            ],
        }
        for name, image, values, labels in zip(images, loaded, top.values.tolist(), top.indices.tolist(), strict=True)
    ]
    if as_json:
        click.echo(json.dumps({"checkpoint": checkpoint, "device": str(used_device), "images": results}))
        return 0
    for result in results:
        best = ", ".join(f"{p['class']} {100 * p['probability']:.1f} %" for p in result["predictions"])
        click.echo(f"{result['file']}: {best}{' (inverted)' if result['inverted'] else ''}")
    return 0
