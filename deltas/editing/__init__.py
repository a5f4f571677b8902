"""How a model is read and changed so that everything can be undone, bit for bit."""
