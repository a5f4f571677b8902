"""Formats of peft, one a file; each names its `FORMATS`, and `deltas.interop.peft` finds them."""
