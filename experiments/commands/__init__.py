"""Subcommands of ``deltacontrol``, one a file; `experiments.cli` finds them."""
