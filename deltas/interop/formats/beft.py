"""BEFT: a trained change of the biases of linear maps, which is BitFit at these maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.interop.fields import COMMON, TARGETS, Field
from deltacontrol.deltas.interop.format import Attached, Description, Format, Plan, Slot
from deltacontrol.deltas.interop.targets import as_sites, short_names, targets
from deltacontrol.deltas.methods.bitfit import BitFit
from deltacontrol.theory.errors import InputError


class BeftFormat(Format):
    """The file holds the change of a bias, (1, out); the control is the bias itself."""

    peft_type = "BEFT"
    fields = {
        **COMMON,
        "target_modules": TARGETS["target_modules"],
        "init_weights": Field(True, "true or false"),
    }
    writes = (BitFit,)

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """One BitFit at the targeted modules."""
        paths = targets(config, host)
        odd = [path for path in paths if not _has_bias(host.sites.modules[path])]
        if odd:
            raise InputError(
                f"peft's BEFT acts at Linear modules with a bias alone, not at {', '.join(odd)}; "
                "choose other sites, or bias='all' of another type."
            )
        slots = [self._slot(path, host) for path in paths]
        return Plan([BitFit(sites=as_sites(paths, host))], slots, paths)

    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """All trained biases."""
        controls = {name: value for item in attached for name, value in item.controls.items()}
        paths = [name.rpartition(".")[0] for name in controls]
        config = {"target_modules": short_names(paths, host.sites.modules)}
        return Description(config, controls, paths)

    def _slot(self, path: str, host: Host) -> Slot:
        name = f"{path}.bias"
        base = host.original(name).detach().cpu()

        def split(change: Tensor) -> Sequence[Tensor]:
            return (base + change.flatten().to(base.dtype),)

        def join(controls: Sequence[Tensor]) -> Tensor:
            return (controls[0] - base)[None]

        return Slot(f"{self.root}{path}.beft_bias", (1, len(base)), (name,), split, join)


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.bias is not None


FORMATS = (BeftFormat(),)
