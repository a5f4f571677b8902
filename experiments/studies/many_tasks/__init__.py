"""How far deltas are from full fine-tuning over more than a hundred tasks of nine corpora."""
