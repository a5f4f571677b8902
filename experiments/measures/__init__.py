"""What is measured at a real network: kernels, margins, maps of sites, robustness, bounds."""
