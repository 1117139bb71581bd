"""How long the kernels of a training step should take, from counts alone: an estimate, never measured."""
