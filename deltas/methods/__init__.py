"""One delta method a file; :func:`deltas.registry.available` finds them."""
