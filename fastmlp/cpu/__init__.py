"""How matrix products run on a CPU: which library, how many threads, in which dtype."""
