"""What a training costs in memory, time and stored bytes, by batch, length and model."""
