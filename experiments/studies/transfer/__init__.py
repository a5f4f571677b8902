"""What the control of one task is worth for another."""
