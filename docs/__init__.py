"""The documentation site: pages written by hand, and what is generated from the code."""
