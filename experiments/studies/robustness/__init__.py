"""What perturbed texts cost, and what a correction of the hidden states gives back."""
