"""Formats of peft, one a file; each names its `FORMATS`, and `deltacontrol.deltas.interop.peft` finds them."""
