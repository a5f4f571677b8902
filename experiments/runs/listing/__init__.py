"""What `deltacontrol runs` shows: lists, two records side by side, curves, files; and deletion."""
