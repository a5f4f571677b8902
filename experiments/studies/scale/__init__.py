"""Whether larger models close the gap between deltas and full fine-tuning."""
