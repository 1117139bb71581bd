"""Cross-validation of a learning rate: every fold at every rate is a member of one ensemble, and all train at once.

    python examples/cross_validation.py

Cross-validation asks how well a network trained with some setting does on rows that it never saw. The rows are divided
into K folds. For each setting, K networks are trained, each on all folds except one, and each is judged on the fold
that it did not see. With R learning rates that makes K x R small networks of one shape. A loop trains them one after
the other, and each of them is far too small to keep a processor or a GPU busy. An ``MLPEnsemble`` has them all in one
tensor per parameter, with the members as the first axis, and one call of ``TrainStep`` trains them all.

What differs between the members is given per member:

- ``lr`` is a list of E rates.
- ``order`` is int64 [E, n], the rows that each member takes, in its own order. A member's order contains only rows
  outside of its fold. That is all there is to a fold, because the data are in memory once, [N, K], for all members.

Members share nothing else. Each has a loss and an optimizer state of its own, and ends where it would end alone; the
last lines of ``main`` train one member alone and compare. A rate that is too large ruins only its own members. To stop
single members early, set ``step.active[member] = False``; a stopped member stays as it is and costs next to nothing.

With data of your own, standardize the features first. Each member should then use the mean and the deviation of its own
training rows, which makes X [E, N, K] with a member's own copy of the rows.
"""

from __future__ import annotations

import copy

import torch

import fastmlp

FOLDS = 5
RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 1.0)
SIZES = (10, 32, 32, 3)
ROWS, BATCH, EPOCHS = 1000, 50, 12
SETTINGS = {"optimizer": "sgd", "momentum": 0.9}


def tabular_data(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """X [N, 10] and classes [N] that depend on the features by a random network, up to noise."""
    x = torch.randn(ROWS, SIZES[0], generator=generator)
    hidden = torch.tanh(x @ torch.randn(SIZES[0], 16, generator=generator) / 2)
    scores = hidden @ torch.randn(16, SIZES[-1], generator=generator)
    return x, (scores + 0.5 * torch.randn(scores.shape, generator=generator)).argmax(1)


def main() -> dict[float, float]:
    """Train all members, print the table, check one member; returns the mean held-out accuracy by learning rate."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x, y = tabular_data(generator)

    # Member e is fold e % FOLDS at rate e // FOLDS. The folds are the same for all rates.
    members = [(rate, fold) for rate in RATES for fold in range(FOLDS)]
    fold_of_row = torch.randperm(ROWS, generator=generator) % FOLDS
    held_out = torch.stack([fold_of_row == fold for _, fold in members])  # [E, N]
    train_rows = torch.stack([(~mask).nonzero().flatten() for mask in held_out])  # [E, n], n = N (K - 1) / K

    # One starting point for all members, so that they differ only by rate and fold.
    start = fastmlp.MLP(SIZES, "silu")
    ensemble = fastmlp.MLPEnsemble.stack([start] * len(members))
    step = fastmlp.TrainStep(ensemble, lr=[rate for rate, _ in members], **SETTINGS)
    orders = []
    for _ in range(EPOCHS):
        # sort() of random numbers draws a permutation for each member.
        shuffled = torch.rand(train_rows.shape, generator=generator).argsort(1)
        orders.append(train_rows.gather(1, shuffled))
        step.epoch(x, y, BATCH, order=orders[-1])

    with torch.no_grad():
        right = ensemble(x).argmax(-1) == y  # [E, N]
    accuracy = (right & held_out).sum(1) / held_out.sum(1)
    by_rate = dict(zip(RATES, accuracy.view(len(RATES), FOLDS), strict=True))

    guess = y.bincount().max().item() / ROWS
    print(f"{len(members)} networks {'-'.join(map(str, SIZES))}; the largest class has {guess:.1%} of the rows")
    print("learning rate   accuracy on held-out rows: mean over folds ± deviation")
    for rate, folds in by_rate.items():
        print(f"{rate:>13g}   {folds.mean():.1%} ± {folds.std():.1%}")
    means = {rate: folds.mean().item() for rate, folds in by_rate.items()}
    best = max(means, key=means.__getitem__)
    print(f"best: {best:g}")

    # The check: the first fold's member of the best rate, trained alone.
    alone, member = copy.deepcopy(start), members.index((best, 0))
    single = fastmlp.TrainStep(alone, lr=best, **SETTINGS)
    for order in orders:
        single.epoch(x, y, BATCH, order=order[member])
    pairs = zip(alone.parameters(), ensemble.unstack()[member].parameters(), strict=True)
    difference = max((a - b).abs().max().item() for a, b in pairs)
    print(f"member {member} trained alone: its parameters differ by at most {difference:.1e}")
    if difference > 1e-3 or means[best] < guess + 0.1:
        raise SystemExit("the ensemble did not train its members as they train alone")
    return means


if __name__ == "__main__":
    main()
