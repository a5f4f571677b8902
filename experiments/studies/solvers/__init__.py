"""Which solver lowers the loss of one fine-tuning fastest."""
