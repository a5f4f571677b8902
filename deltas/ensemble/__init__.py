"""Many copies of the same deltas, trained in one pass of the frozen model."""
