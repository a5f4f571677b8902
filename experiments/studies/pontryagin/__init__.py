"""Whether optimisers drive the gradient of the Hamiltonian to zero, and in which layers first."""
