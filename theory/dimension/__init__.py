"""Intrinsic dimension: random subspaces, thresholds that a spectrum predicts, estimates from trainings."""
