"""Fine-tuning: the loop, evaluation, devices, checkpoints, and what goes in and out."""
