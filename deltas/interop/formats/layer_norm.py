"""LN_TUNING: whole modules, normalisations as a rule, trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.interop.extras import parameter_slots
from deltacontrol.deltas.interop.fields import COMMON, TARGETS
from deltacontrol.deltas.interop.format import Attached, Description, Format, Plan
from deltacontrol.deltas.interop.targets import as_sites, short_names, targets
from deltacontrol.deltas.methods.layer_norm import LayerNormTuning
from deltacontrol.deltas.methods.selected_modules import SelectedModules


class LayerNormFormat(Format):
    """The file holds copies of the targeted modules' parameters."""

    peft_type = "LN_TUNING"
    fields = {**COMMON, **TARGETS}
    writes = (LayerNormTuning, SelectedModules)

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """LayerNormTuning where all normalisations are targeted, else SelectedModules."""
        paths = targets(config, host)
        names = host.parameter_names(paths)
        norms = host.backbone_names(("norm",))
        whole = set(names) == set(norms)
        delta = LayerNormTuning() if whole else SelectedModules(sites=as_sites(paths, host))
        keys = {}
        for name in names:
            path = next(p for p in paths if name.startswith(p + "."))
            keys[name] = f"{self.root}{path}.ln_tuning_layers{name[len(path) :]}"
        slots = parameter_slots(keys, host)
        return Plan([delta], slots, paths)

    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """The modules whose parameters are trained."""
        controls = {name: v for item in attached for name, v in item.controls.items()}
        paths = list(dict.fromkeys(name.rpartition(".")[0] for name in controls))
        config = {"target_modules": short_names(paths, host.sites.modules)}
        return Description(config, controls, paths)


FORMATS = (LayerNormFormat(),)
