"""What several delta methods share."""
