"""``fastmlp predict``: what a checkpoint sees in image files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common

if TYPE_CHECKING:
    import torch

    from fastmlp.nn import MLP

TOP = 3
#: Images that are in memory together.
BATCH = 64


@click.command("predict", short_help="Classify image files with a checkpoint.")
@click.argument("checkpoint", type=common.Folder())
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

    The background matters: the data show one piece of clothing alone, on a plain background. Whatever else a picture
    shows counts as part of the piece, and the answer then means little. Cut the piece out first.

    An image that cannot be read is reported, and the others are classified. The exit code is then 2.
    """
    used_device = common.select_device(device)
    model, _ = common.load_model(checkpoint, used_device)
    common.check_sizes(model.sizes, f"the checkpoint {checkpoint} has sizes")
    common.select_backend(backend, used_device, next(model.parameters()).dtype)
    results: list[dict[str, Any]] = []
    errors: list[dict[str, str]] = []
    for first in range(0, len(images), BATCH):
        found, wrong = _classified(model, images[first : first + BATCH], invert, used_device)
        errors += wrong
        if as_json:
            results += found
            continue
        for result in found:
            best = ", ".join(f"{p['class']} {100 * p['probability']:.1f} %" for p in result["predictions"])
            click.echo(f"{result['file']}: {best}{' (inverted)' if result['inverted'] else ''}")
    if as_json:
        content = {"checkpoint": checkpoint, "device": str(used_device), "images": results, "errors": errors}
        click.echo(json.dumps(content))
    return common.UserError.exit_code if errors else 0


def _classified(
    model: MLP, names: Sequence[str], invert: bool | None, device: torch.device
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(results, errors) of some images, as --json prints them; errors and warnings are also shown at once."""
    import torch

    from fastmlp.data.fashion_mnist import CLASSES
    from fastmlp.data.images import load_image

    loaded, results, errors = [], [], []
    for name in names:
        try:
            image = load_image(Path(name), invert)
        except (OSError, ValueError) as error:
            errors.append({"file": name, "error": str(error)})
            common.say("error", str(error))
            continue
        if image.empty:
            common.say("warning", f"{name} shows nothing but background; its classes mean nothing")
        loaded.append(image.pixels)
        results.append({"file": name, "inverted": image.inverted, "empty": image.empty})
    if not loaded:
        return results, errors
    with torch.no_grad():
        probabilities = torch.softmax(model(torch.stack(loaded).to(device)).float(), dim=1).cpu()
    top = probabilities.topk(TOP, dim=1)
    for result, values, labels in zip(results, top.values.tolist(), top.indices.tolist(), strict=True):
        result["predictions"] = [
            {"class": CLASSES[label], "label": label, "probability": probability}
            for probability, label in zip(values, labels, strict=True)
        ]
    return results, errors
