"""A table in which few rows are of the class that matters: weights of classes and rows, and early stopping.

    python examples/tabular.py

A network that always answers "no" is right on 96 % of these rows, and useless. The example does six things
about it:

- ``class_weight`` lets a rare row count as much in the loss as its class lacks in number.
- The printed table has the recall of both classes and their mean, because accuracy is no measure here.
- ``fit`` stops after ``patience`` epochs without progress on validation data, and keeps the best epoch. It judges by
  the plain loss, without weights. The validation data therefore have the rare rows repeated until both classes are
  equally many, so that the plain loss counts as the weighted loss does.
- ``label_smoothing`` keeps the network from being too sure of labels, of which some are wrong.
- ``param_groups`` with a pattern takes the biases out of the weight decay.
- ``sample_weight`` is a weight for each training row: here old rows count less.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastmlp

ROWS, FEATURES, EPOCHS, BATCH, LR = 8000, 12, 60, 200, 0.003
SETTINGS: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": LR,
    "weight_decay": 0.01,
    "param_groups": [{"params": "*.bias", "weight_decay": 0.0}],
}


def table(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """X [N, 12], classes [N] of which about 4 % are 1, and the age of each row, 0 to 1. Old labels are often wrong."""
    x, age = torch.randn(ROWS, FEATURES, generator=generator), torch.rand(ROWS, generator=generator)
    score = x[:, 0] * x[:, 1] + x[:, 2].square() + x[:, 3:6].sum(1)
    y = (score > score.quantile(0.97)).long()
    wrong = torch.rand(ROWS, generator=generator) < 0.01 * age
    return x, torch.where(wrong, 1 - y, y), age


def recalls(model: fastmlp.MLP, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The share of each class that the model finds."""
    with torch.no_grad():
        right = model(x).argmax(1) == y
    return right[y == 0].float().mean().item(), right[y == 1].float().mean().item()


def main() -> dict[str, float]:
    """Train with and without weights, print both; returns the recall of class 1 by name."""
    torch.manual_seed(0)
    x, y, age = table(torch.Generator().manual_seed(0))
    train, held, test = (slice(0, 5000), slice(5000, 6000), slice(6000, None))
    mean, std = x[train].mean(0), x[train].std(0)
    x = (x - mean) / std

    # Validation data in which both classes have the same number of rows.
    common, rare = ((y[held] == c).nonzero().flatten() + held.start for c in (0, 1))
    balanced = torch.cat([common, rare.repeat(-(-len(common) // len(rare)))[: len(common)]])

    counts = y[train].bincount()
    weights = counts.sum() / (2 * counts.float())
    print(f"{ROWS} rows, {y.float().mean():.1%} of class 1; class weights {weights[0]:.2f} and {weights[1]:.2f}")
    found: dict[str, float] = {}
    for name in ("plain", "weighted"):
        torch.manual_seed(1)
        model = fastmlp.MLP([FEATURES, 32, 32, 2], "silu")
        options: dict[str, Any] = {}
        if name == "weighted":
            options = {"class_weight": weights, "label_smoothing": 0.05, "sample_weight": 1 - 0.5 * age[train]}
        judge = balanced if name == "weighted" else held
        history = fastmlp.fit(
            model, (x[train], y[train]), validation=(x[judge], y[judge]), epochs=EPOCHS, batch_size=BATCH,
            schedule="constant", patience=6, **SETTINGS, **options,
        )  # fmt: skip
        no, found[name] = recalls(model, x[test], y[test])
        print(
            f"{name:>8}: recall of class 0 {no:.1%}, of class 1 {found[name]:.1%}, mean {(no + found[name]) / 2:.1%}; "
            f"best epoch {history.best.epoch}, stopped after {history.last.epoch}"
        )
    if found["weighted"] < found["plain"] + 0.05:
        raise SystemExit("the weights did not help")
    return found


if __name__ == "__main__":
    main()
