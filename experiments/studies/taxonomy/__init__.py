"""Every method at a glance."""
