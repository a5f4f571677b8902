"""Signals at random moments, and what is left of the work.

    python -m tests.kill --moments 50 --seed 0

A training, a solve, the search of a dimension, a sweep and a pre-training, each tiny, are stopped
by SIGKILL, SIGTERM or SIGINT at a random moment, up to twice in a row, and then run to their end.
What they record has to be what an undisturbed run records: results, curves and controls, bit for
bit. Records that were finished before the signal have to be untouched, and nothing half done may
stay.
"""
