"""Second-order models of one trajectory: derivatives of all steps, sweeps, programmes in a box."""
