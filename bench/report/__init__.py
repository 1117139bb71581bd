"""What is written about runs, from their JSON alone: tables, plots, comparisons, RESULTS.md and README.md."""
