"""How many random directions of parameter space suffice, by task, size and pre-training."""
