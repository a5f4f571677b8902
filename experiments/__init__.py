"""Models, tasks, training, runs and claims: everything that touches real networks and real data."""
