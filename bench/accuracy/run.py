"""Time to accuracy: seconds of training until a test accuracy is first reached, over several seeds.

    {"format": 1, "kind": "accuracy", "preset": "accuracy", "command": ..., "started": ..., "machine": {...},
     "data": ..., "seeds": 5, "targets": [0.8833, 0.89, 0.9], "looks_per_epoch": 4,
     "contenders": [{"name": ..., "label": ..., "settings": ..., "status": ..., "reason": ..., "setup_s": ...,
                     "runs": [{"seed": ..., "seconds": ..., "epochs": ..., "reached": {"0.89": seconds or null, ...},
                               "curve": [{"epoch": ..., "seconds": ..., "accuracy": ...}, ...]}, ...]}, ...]}

The clock runs during the training steps only. ``setup_s`` has the compilation and the warm-up; the looks at the
accuracy are not timed. A run ends when the highest target is reached, or after the epochs of its settings.
"""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.measure import machine
from bench.measure.results import FORMAT, Document
from fastmlp import load_fashion_mnist

from .learners import LEARNERS, Data, Learner, Session

__all__ = ["LOOKS_PER_EPOCH", "TARGETS", "load_data", "run_accuracy", "train_to"]

TARGETS = (0.8833, 0.89, 0.9)
LOOKS_PER_EPOCH = 4

Log = Callable[[str], None]


def load_data(source: str | None, device: str) -> Data:
    """FashionMNIST on the device; ``source`` is a folder, "bundled" for the subset, or None for the usual places.

    Raises:
        FileNotFoundError: only the bundled subset is there, and it was not asked for.
    """
    if source == "bundled":
        train, test = load_fashion_mnist(device=device, source="bundled")
    else:
        train, test = load_fashion_mnist(source, device)
        if len(train.labels) < 60_000:
            raise FileNotFoundError(
                f"the time to accuracy needs the full FashionMNIST, found {len(train.labels)} images ({train.source}); "
                "give its folder with --data"
            )
    return Data(
        train.images,
        train.labels,
        test.images,
        test.labels,
        f"FashionMNIST, {len(train.labels):,} training and {len(test.labels):,} test images",
    )


def train_to(
    session: Session, seed: int, epochs: int, targets: Sequence[float], looks: int = LOOKS_PER_EPOCH
) -> dict[str, Any]:
    """One run from its starting values to the highest target."""
    session.reset(seed)
    session.finish()
    seconds, curve = 0.0, []
    reached: dict[str, float | None] = {str(target): None for target in targets}
    for epoch, part in ((e, p) for e in range(epochs) for p in range(looks)):
        gc.collect()
        begin = time.perf_counter()
        session.train(epoch, part, looks)
        session.finish()
        seconds += time.perf_counter() - begin
        accuracy = session.accuracy()
        curve.append({"epoch": epoch + (part + 1) / looks, "seconds": seconds, "accuracy": accuracy})
        for target in targets:
            if accuracy >= target and reached[str(target)] is None:
                reached[str(target)] = seconds
        if all(value is not None for value in reached.values()):
            break
    return {"seed": seed, "seconds": seconds, "epochs": curve[-1]["epoch"], "reached": reached, "curve": curve}


def _contender(
    learner: Learner, data: Data, seeds: int, targets: Sequence[float], epochs: int | None, log: Log
) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": learner.name, "label": learner.label, "settings": str(learner.settings)}
    available = learner.available(data.device)
    if not available.ok:
        return {**entry, "status": "unavailable", "reason": available.reason}
    try:
        begin = time.perf_counter()
        session = learner.build(data)
        session.warm_up()
        session.finish()
        entry["setup_s"] = time.perf_counter() - begin
        runs = []
        for seed in range(seeds):
            runs.append(train_to(session, seed, learner.settings.most_epochs(epochs), targets))
            reached = ", ".join(
                f"{100 * float(t):g} %: {'-' if s is None else f'{s:.1f} s'}" for t, s in runs[-1]["reached"].items()
            )
            log(f"  seed {seed}: {reached}")
    except Exception as error:  # a contender that breaks must not end the run of the others
        return {**entry, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
    return {**entry, "status": "ok", "reason": "", "runs": runs}


def run_accuracy(
    data: Data,
    command: str,
    log: Log,
    *,
    seeds: int = 5,
    targets: Sequence[float] = TARGETS,
    epochs: int | None = None,
) -> Document:
    """Every learner, ``seeds`` runs each; ``epochs`` replaces the settings' own."""
    started = datetime.datetime.now(datetime.timezone.utc)
    about = machine.describe(str(data.device))
    contenders = []
    for learner in LEARNERS:
        log(f"{learner.label}: {learner.settings}")
        contenders.append(_contender(learner, data, seeds, targets, epochs, log))
        if contenders[-1]["status"] != "ok":
            log(f"  {contenders[-1]['status']}: {contenders[-1]['reason']}")
    if data.device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        "format": FORMAT,
        "kind": "accuracy",
        "preset": "accuracy",
        "command": command,
        "started": started.isoformat(timespec="seconds"),
        "machine": about,
        "data": data.source,
        "seeds": seeds,
        "targets": list(targets),
        "looks_per_epoch": LOOKS_PER_EPOCH,
        "contenders": contenders,
    }
