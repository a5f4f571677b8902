"""Formats of peft, one a file that names its `FORMATS`; `deltas.interop.peft` finds them."""
