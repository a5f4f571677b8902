"""Derivatives as linear operators, and what products with them tell: spectra, Gramians, curvature."""
