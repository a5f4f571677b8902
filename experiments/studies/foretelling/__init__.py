"""How good predictions before training are, held against the study of many tasks."""
