"""Delta tuning of Transformers as discrete optimal control."""
