"""Of which rank full fine-tuning's update is, and what its tail foretells."""
