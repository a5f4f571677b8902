"""Intrinsic dimension: random subspaces, thresholds by a spectrum, estimates from trainings."""
