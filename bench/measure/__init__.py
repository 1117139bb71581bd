"""How a number is measured: the gate, the turns, the machine and the JSON of a run."""
