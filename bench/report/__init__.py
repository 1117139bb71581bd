"""Tables, plots, comparisons, RESULTS.md and README.md's figures, from the JSON of runs alone."""
