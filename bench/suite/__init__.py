"""``pytest bench``: one file per kind of problem."""
