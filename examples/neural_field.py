"""A neural field: a network that is an image, from coordinates to colours.

    python examples/neural_field.py [PNG]

The network maps a point (u, v) of the unit square to a colour (r, g, b). It is trained on half of the pixels of an
image, drawn at random, and judged on the other half. The result is a function, which can be drawn at any resolution.

A network of two inputs learns edges slowly. The points are therefore mapped to sines and cosines of many directions and
frequencies first (Tancik et al. 2020). Sines and cosines are computed once, before the training, since the points stay
as they are. The example trains both ways and compares them by PSNR = -10 log10(mean squared error), in decibels.

``TrainStep.epoch`` takes all rows in a drawn order, and ``lr_factors`` lets the learning rate fall to zero.
"""

from __future__ import annotations

import math
import sys

import torch
from PIL import Image
from torch import Tensor

import fastmlp
from fastmlp.train.schedules import lr_factors

EDGE, FREQUENCIES, SCALE = 96, 64, 6.0
EPOCHS, BATCH, LR = 25, 256, 0.005


def points(edge: int) -> Tensor:
    """The centres of the pixels of a square image [edge * edge, 2], row by row."""
    along = (torch.arange(edge) + 0.5) / edge
    return torch.cartesian_prod(along, along)


def picture(at: Tensor) -> Tensor:
    """Colours [N, 3] from 0 to 1 of a picture at points [N, 2]: a sky, a sun and striped hills."""
    v, u = at.unbind(1)
    sky = torch.stack([0.4 + 0.4 * v, 0.6 + 0.2 * v, 0.9 - 0.2 * v], 1)
    sun = ((u - 0.7).square() + (v - 0.3).square()).sqrt() < 0.13
    hills = v > 0.65 + 0.12 * torch.sin(9 * u)
    stripes = torch.sin(60 * (u + v)) > 0
    image = torch.where(sun.unsqueeze(1), torch.tensor([1.0, 0.9, 0.3]), sky)
    green, dark = torch.tensor([0.2, 0.6, 0.2]), torch.tensor([0.1, 0.35, 0.15])
    return torch.where(hills.unsqueeze(1), torch.where(stripes.unsqueeze(1), green, dark), image)


def psnr(model: fastmlp.MLP, x: Tensor, y: Tensor) -> float:
    """Decibels."""
    with torch.no_grad():
        return -10 * math.log10((model(x).clamp(0, 1) - y).square().mean().item())


def main(path: str | None = None) -> dict[str, float]:
    """Train both fields and print their PSNR, and write the better one as a PNG; returns the PSNR by name."""
    torch.manual_seed(0)
    at, drawn = points(EDGE), torch.randperm(EDGE * EDGE)
    colours = picture(at)
    seen, unseen = drawn[::2], drawn[1::2]
    waves = SCALE * torch.randn(2, FREQUENCIES)

    def sines(at: Tensor) -> Tensor:
        angles = 2 * math.pi * at @ waves
        return torch.cat([angles.sin(), angles.cos()], 1)

    found: dict[str, float] = {}
    for name, inputs in (("coordinates", lambda at: 2 * at - 1), ("sines and cosines", sines)):
        x = inputs(at)
        model = fastmlp.MLP([x.shape[1], 64, 64, 3], "relu")
        step = fastmlp.TrainStep(model, "adam", lr=LR, loss="mse")
        steps = -(-len(seen) // BATCH)
        factors = lr_factors("cosine", EPOCHS * steps)
        for epoch in range(EPOCHS):
            order = seen[torch.randperm(len(seen))]
            step.epoch(x, colours, BATCH, order, factors[epoch * steps : (epoch + 1) * steps])
        found[name] = psnr(model, x[unseen], colours[unseen])
        print(f"{name:>18}: PSNR {found[name]:.1f} dB on the pixels that were not seen")

    if path is not None:
        with torch.no_grad():
            pixels = model(sines(points(4 * EDGE))).clamp(0, 1).mul(255).round().byte()
        Image.fromarray(pixels.view(4 * EDGE, 4 * EDGE, 3).numpy()).save(path)
        print(f"wrote {path}, four times as large as the image that was seen")
    if found["sines and cosines"] < found["coordinates"] + 3:
        raise SystemExit("sines and cosines did not help")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2])
