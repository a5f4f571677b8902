"""HRA: chains of Householder reflections of the input of linear maps."""

from __future__ import annotations

from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.interop.fields import Field
from deltacontrol.deltas.interop.format import Slot
from deltacontrol.deltas.interop.modules import FLAG, NAMES, SIZE, ModuleFormat, biases
from deltacontrol.deltas.methods.hra import HRA


class HraFormat(ModuleFormat):
    """The vectors of the reflections as columns, (in, r)."""

    peft_type = "HRA"
    fields = {
        **NAMES,
        "r": SIZE,
        "apply_GS": FLAG,
        "bias": biases("hra_only"),
        "init_weights": Field(True, "true or false"),
    }
    writes = (HRA,)
    bias_word = "hra_only"
    kind = HRA
    same = {"r": "rank", "apply_GS": "gram_schmidt"}
    linear_only = True

    def slots(self, delta: HRA, site: Site) -> list[Slot]:
        """U."""
        return [self.slot(site, "hra_u", "U", site.in_features, delta.rank)]


FORMATS = (HraFormat(),)
