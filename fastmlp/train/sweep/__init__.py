"""A sweep: many MLPs that differ in settings, seed and fold, trained in groups as ensembles.

`plan` has the members and divides them into groups, `group` trains a group, `results` ranks the members and keeps what
a group gave, and `picture` draws the scores. ``fastmlp sweep`` (``fastmlp/cli/sweep.py``) is the way to all of it.
"""
