"""How a number comes about: the gate, the turns, the machine and the JSON of a run."""
