"""The compile lane: every kernel as machine code for every target. tests/README.md describes it."""
