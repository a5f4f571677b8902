"""Whether a spectrum predicts when random subspaces succeed."""
