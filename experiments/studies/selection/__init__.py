"""Which layers, sites and rank a convex program picks."""
