"""Pre-training of the family of models: its tokens, its batches, and the run that is recorded."""
