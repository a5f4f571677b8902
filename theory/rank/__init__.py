"""Rank: spectra and subspaces of updates, and the rank that a target needs."""
