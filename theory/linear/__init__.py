"""Derivatives as linear operators, and what their products tell: spectra, Gramians, curvature."""
