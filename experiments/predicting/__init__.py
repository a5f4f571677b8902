"""Which delta, which rate and which rank, before any training."""
