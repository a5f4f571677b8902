"""An experiment, its record, the store of records, and the sweep that computes what is missing."""
