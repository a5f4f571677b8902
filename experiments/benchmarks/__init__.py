"""Benchmarks: commands that print ratios, alternating the contestants in one process."""
