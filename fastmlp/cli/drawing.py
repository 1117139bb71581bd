"""The pictures of a run folder, which ``fastmlp train`` draws at its end and ``fastmlp report`` draws anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import defaults, shown

if TYPE_CHECKING:
    from fastmlp.nn import MLP
    from fastmlp.train import History
    from fastmlp.train.judged import Judged

    from .inputs import Format

#: The files of the pictures by what they show.
PICTURES = {
    "curves": "curves.png",
    "confusion": "confusion.png",
    "mistakes": "mistakes.png",
    "weights": "weights.png",
}
#: What a message calls them.
_NAMES = {
    "curves": "the curves were",
    "confusion": "the confusion matrix was",
    "mistakes": "the mistakes were",
    "weights": "the weights were",
}


def draw(
    folder: Path, model: MLP, form: Format, history: History, about: dict[str, Any], judged: Judged | None
) -> tuple[dict[str, Path], dict[str, str]]:
    """Draw the pictures that there is something for.

    Args:
        model: the model of the checkpoint.
        form: what the model takes and gives.
        about: what the summary says, or as much of it as there is.
        judged: None for a model of values, and for a run without an end.

    Returns:
        The files that were drawn, and for each one that failed the reason.
    """
    drawn: dict[str, Path] = {}
    failed: dict[str, str] = {}
    for name, draw_one in _drawers(folder, model, form, history, about, judged).items():
        try:
            draw_one()
            drawn[name] = folder / PICTURES[name]
        except Exception as error:
            failed[_NAMES[name]] = f"{type(error).__name__}: {error}"
    return drawn, failed


def _drawers(
    folder: Path, model: MLP, form: Format, history: History, about: dict[str, Any], judged: Judged | None
) -> dict[str, Callable[[], None]]:
    from fastmlp.train import pictures, plots

    config = about["config"]
    title = f"{'-'.join(map(str, config['sizes']))}, {config['activation']}"
    path = {name: folder / file for name, file in PICTURES.items()}
    wanted: dict[str, Callable[[], None]] = {
        "curves": lambda: plots.plot_history(
            history, path["curves"], title=title, subtitle=_settings(config), caption=_caption(about)
        )
    }
    classes, shape = form.classes or (), form.shape or ()
    if judged is not None and classes:
        wanted["confusion"] = lambda: pictures.plot_confusion(judged, classes, path["confusion"], title)
        if form.is_of_images and len(judged.labels):
            wanted["mistakes"] = lambda: pictures.plot_mistakes(judged, classes, shape, path["mistakes"], title)
    if form.is_of_images:
        weight = next(model.parameters())
        wanted["weights"] = lambda: pictures.plot_weights(weight, shape, path["weights"], title)
    return wanted


def _settings(config: dict[str, Any]) -> str:
    """The line of settings below a picture's title."""
    from fastmlp.step.optimizers import OPTIMIZERS

    name = config.get("optimizer", "sgd")
    parts = [f"{name.upper()}, learning rate {config['lr']:g} ({config['schedule']})"]
    if "momentum" in config:
        parts.append(f"{'Nesterov ' if config.get('nesterov') else ''}momentum {config['momentum']:g}")
    usual = defaults(OPTIMIZERS[name]) if name in OPTIMIZERS else {}
    for setting, value in usual.items():
        now = config.get(setting, value)
        if setting not in ("momentum", "nesterov") and shown(now) != shown(value):
            parts.append(f"{setting.replace('_', ' ')} {shown(now)}")
    return ", ".join([*parts, f"batch {config['batch_size']}", config["dtype"], f"seed {config['seed']}"])


def _caption(about: dict[str, Any]) -> str:
    speed = f"{about['images_per_second']:,.0f} images/s, " if "images_per_second" in about else ""
    return (
        f"{about['dataset']}\n{about['device_name']}, {about['backend']} backend, {speed}"
        f"torch {about['versions']['torch']}"
    )
