"""Predictors, one file each, found by `deltacontrol.experiments.predicting.registry`."""
