"""One delta method a file; :func:`deltacontrol.deltas.registry.available` finds them."""
