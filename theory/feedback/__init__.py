"""Feedback laws: gains, corrections towards a manifold, steering."""
