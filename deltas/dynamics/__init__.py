"""A Transformer with deltas as a discrete dynamical system."""
