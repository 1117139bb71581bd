"""``fastmlp predict``: what a checkpoint sees in image files, or in the rows of .npz files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common
from .inputs import Format

if TYPE_CHECKING:
    import torch

    from fastmlp.nn import MLP

TOP = 3
#: Images that are in memory together, and rows of an .npz file that go through the model together.
BATCH, ROWS = 64, 2048


@click.command("predict", short_help="Classify image files, or the rows of .npz files, with a checkpoint.")
@click.argument("checkpoint", type=common.Folder())
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--invert/--no-invert",
    default=None,
    help="Exchange light and dark, or do not.  [default: of FashionMNIST, if the border is bright; else not]",
)
@common.machine_options
@common.json_option
def command(
    checkpoint: str, images: tuple[str, ...], invert: bool | None, device: str, backend: str, as_json: bool
) -> int:
    """Classify IMAGE files with CHECKPOINT (a run folder or its model file).

    Images of any size are taken, in gray or colour, in any format that pillow reads. For a model of FashionMNIST,
    margins are cut, the longest edge is fitted to 28 pixels, and transparent parts count as background. For a model of
    other images, they are scaled to the size of its data.

    The background matters: FashionMNIST shows one piece of clothing alone, on a plain background. Whatever else a
    picture shows counts as part of the piece, and the answer then means little. Cut the piece out first.

    An IMAGE that ends in .npz is a file of rows, its array x, as in training. A model of values gives its values.

    An image that cannot be read is reported, and the others are classified. The exit code is then 2.
    """
    used_device = common.select_device(device)
    model, config = common.load_model(checkpoint, used_device)
    form = Format.of_checkpoint(config, model.sizes, checkpoint)
    common.select_backend(backend, used_device, next(model.parameters()).dtype)
    results: list[dict[str, Any]] = []
    errors: list[dict[str, str]] = []
    for first in range(0, len(images), BATCH):
        found, wrong = _results(model, form, images[first : first + BATCH], invert, used_device)
        errors += wrong
        if as_json:
            results += found
            continue
        for result in found:
            click.echo(_line(result))
    if as_json:
        content = {"checkpoint": checkpoint, "device": str(used_device), "images": results, "errors": errors}
        click.echo(json.dumps(content))
    return common.UserError.exit_code if errors else 0


def _line(result: dict[str, Any]) -> str:
    """A result for people."""
    where = f"{result['file']}[{result['row']}]" if "row" in result else result["file"]
    if "values" in result:
        return f"{where}: {', '.join(f'{value:.6g}' for value in result['values'])}"
    best = ", ".join(f"{p['class']} {100 * p['probability']:.1f} %" for p in result["predictions"])
    return f"{where}: {best}{' (inverted)' if result.get('inverted') else ''}"


def _results(
    model: MLP, form: Format, names: Sequence[str], invert: bool | None, device: torch.device
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(results, errors) of some files, as --json prints them; errors and warnings are also shown at once."""
    import torch

    from fastmlp.data.npz import load_inputs

    results: list[dict[str, Any]] = []
    errors: list[dict[str, str]] = []
    images: list[tuple[torch.Tensor, dict[str, Any]]] = []
    dtype = next(model.parameters()).dtype
    for name in names:
        try:
            if name.lower().endswith(".npz"):
                x = form.transformed(load_inputs(Path(name)).to(device), dtype, name)
                rows = [{"file": name, "row": row} for row in range(len(x))]
                for first in range(0, len(x), ROWS):
                    _predict(model, form, x[first : first + ROWS], rows[first : first + ROWS])
                results += rows
            else:
                pixels, facts = _image(form, name, invert)
                results.append({"file": name, **facts})
                images.append((pixels, results[-1]))
        except (OSError, ValueError, common.UserError) as error:
            errors.append({"file": name, "error": str(error)})
            common.say("error", str(error))
    if images:
        _predict(model, form, torch.stack([x for x, _ in images]).to(device), [result for _, result in images])
    return results, errors


def _image(form: Format, name: str, invert: bool | None) -> tuple[torch.Tensor, dict[str, Any]]:
    """The pixels of an image as the model takes them, and what --json says of them."""
    import torch

    from fastmlp.data.images import load_image, load_pixels

    if form.is_fashion_mnist:
        image = load_image(Path(name), invert)
        if image.empty:
            common.say("warning", f"{name} shows nothing but background; its classes mean nothing")
        return image.pixels, {"inverted": image.inverted, "empty": image.empty}
    if not form.is_of_images or form.shape is None:
        raise common.UserError(
            f"the model takes rows of {form.inputs} features, not images like {name}; give an .npz file"
        )
    values = torch.tensor(load_pixels(Path(name), form.shape), device="cpu").flatten()
    return 255 - values if invert else values, {"inverted": bool(invert)}


def _predict(model: MLP, form: Format, x: torch.Tensor, results: list[dict[str, Any]]) -> None:
    """Add what the model gives for the rows of x to their results."""
    import torch

    from fastmlp.train.scores import metric_of

    with torch.no_grad():
        outputs = model(x).float()
    if form.classes is None:
        values = outputs.sigmoid() if metric_of(form.loss) == "accuracy" else outputs  # "bce" is a loss of logits
        for result, row in zip(results, values.tolist(), strict=True):
            result["values"] = row
        return
    top = torch.softmax(outputs, dim=1).cpu().topk(min(TOP, form.outputs), dim=1)
    for result, probabilities, labels in zip(results, top.values.tolist(), top.indices.tolist(), strict=True):
        result["predictions"] = [
            {"class": form.classes[label], "label": label, "probability": probability}
            for probability, label in zip(probabilities, labels, strict=True)
        ]
