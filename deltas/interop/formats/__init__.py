"""Formats of peft, one a file with its `FORMATS`, for `deltacontrol.deltas.interop.peft`."""
