"""Which learning rate each method wants, searched on validation rows."""
