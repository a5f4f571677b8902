"""Which layers and sites can move the output, at which least energy."""
