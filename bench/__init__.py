"""Benchmarks of fastmlp beside what else trains small MLPs. ``python -m bench`` runs them; README.md says how.

- ``problems``: what is timed, with its inputs, its arithmetic and its oracle
- ``rivals``: the contenders, each in a file of its own
- ``measure``: from a preset to one JSON file; no time is taken of a wrong result, and all contenders run in turn
- ``presets``: what a run times
- ``suite``: the same under pytest-benchmark
- ``accuracy``: seconds of training to a test accuracy
- ``report``: tables and plots from JSON alone
"""
