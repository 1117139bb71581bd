"""The report of the JSON of runs: curves that hide others, names of points, one machine in the README."""

from __future__ import annotations

import pytest

from bench.accuracy.learners import LEARNERS
from bench.measure.machine import slug
from bench.measure.results import FOLDER, load_all
from bench.report import figures
from bench.report.readme import speed_section
from bench.rivals import RIVALS

POINTS = [(1, 1e-3), (64, 2e-3)]


def test_a_series_is_hidden_by_the_last_one_drawn_over_it():
    near = [(place, 1.02 * value) for place, value in POINTS]
    partly = [POINTS[0], (64, 3e-3)]
    series = {"fastmlp": POINTS, "eager": POINTS, "jax": near, "inplace": partly, "short": POINTS[:1]}
    assert figures._hidden(series) == {"eager": "fastmlp", "jax": "fastmlp", "short": "fastmlp"}


def test_every_learner_of_the_time_to_accuracy_has_a_colour_of_the_contenders():
    names = {figures._LEARNERS.get(learner.name, learner.name) for learner in LEARNERS}
    assert names <= set(figures.STYLES)
    assert set(figures.STYLES) - {"quickstart"} <= {rival.name for rival in RIVALS}


def machine(name: str, started: str, *, is_gpu: bool = False) -> list[dict]:
    """A quick run and a run of the time to accuracy on one machine."""
    about = {"name": name, "slug": slug(name, "cuda" if is_gpu else "cpu", 2), "is_gpu": is_gpu, "threads": 2}
    about |= {"versions": {"torch": "2"}, "commit": "abc", "changed_files": []}
    head = {"machine": about, "started": started, "command": "fastmlp bench"}
    run = {"seconds": 20.0, "epochs": 10.0}
    learner = {"label": f"learner on {name}", "status": "ok", "runs": [run]}
    return [
        {**head, "kind": "times", "preset": "quick", "cases": []},
        {**head, "kind": "accuracy", "preset": "accuracy", "seeds": 1, "contenders": [learner]},
    ]


@pytest.mark.parametrize("is_gpu", [False, True])
def test_the_readme_shows_the_machine_of_the_newest_quick_run(is_gpu):
    older, newer = machine("Old CPU", "2026-01-01"), machine("New machine", "2026-01-02", is_gpu=is_gpu)
    text = speed_section([*newer, *older])
    assert "New machine" in text
    assert "2.00 (learner on New machine)" in text
    assert "Old CPU" not in text
    assert ("No GPU has been timed" in text) != is_gpu
    assert "learner" not in speed_section([newer[0], *older])
    assert "RESULTS.md" in speed_section([])


def test_committed_results_are_named_by_one_scheme():
    """Every folder has the name that ``slug`` gives its machine."""
    documents = load_all(FOLDER)
    assert documents
    for document in documents:
        about = document["machine"]
        assert about["slug"] == slug(about["name"], about["device"], about["threads"])
        assert (FOLDER / about["slug"] / f"{document['preset']}.json").is_file()
