"""Depth as time: continuous limits, perturbations, turnpikes."""
