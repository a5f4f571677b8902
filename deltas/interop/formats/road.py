"""ROAD: rotations of pairs of output features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.interop.fields import COMMON, TARGETS, Field
from deltacontrol.deltas.interop.format import Attached, Slot, shared
from deltacontrol.deltas.interop.modules import ModuleFormat
from deltacontrol.deltas.methods.road import RoAd

_VARIANTS = {"road_1": "one", "road_2": "two", "road_4": "four"}


class RoadFormat(ModuleFormat):
    """θ and α of the blocks, as they are."""

    peft_type = "ROAD"
    fields = {
        **COMMON,
        "target_modules": TARGETS["target_modules"],
        "variant": Field("road_1", only=(*_VARIANTS,), why="peft has no other"),
        "group_size": Field(64, "a positive integer"),
        "init_weights": Field(True, "true or false"),
    }
    writes = (RoAd,)
    kind = RoAd
    linear_only = True

    def fields_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The variant and the group."""
        return {"variant": _VARIANTS[config["variant"]], "group_size": config["group_size"]}

    def config_of(self, attached: Sequence[Attached]) -> dict[str, Any]:
        """The same in peft's words."""
        own = shared(attached, "variant")
        variant = next(word for word, name in _VARIANTS.items() if name == own)
        return {"variant": variant, "group_size": shared(attached, "group_size")}

    def slots(self, delta: RoAd, site: Site) -> list[Slot]:
        """θ and α."""
        number = delta.num_angles(site)
        return [self.slot(site, f"road_{name}", name, number) for name in ("theta", "alpha")]


FORMATS = (RoadFormat(),)
