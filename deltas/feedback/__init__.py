"""Feedback laws attached to a model at inference."""
