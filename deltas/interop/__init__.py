"""Interoperability with other libraries: adapters of peft."""

from deltacontrol.deltas.interop.peft import export_peft, import_peft

__all__ = ["export_peft", "import_peft"]
