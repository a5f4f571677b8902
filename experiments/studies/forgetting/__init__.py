"""How far a tuned language model moves from its base on other text."""
