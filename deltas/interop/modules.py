"""Formats that are one method at linear modules: a table of fields, and the tensors of a module.

Such a format names which field of the configuration is which field of the delta, for all modules or
by patterns, and which tensor of a module is which control. Planning and describing follow.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.interop.adapter import whole
from deltacontrol.deltas.interop.factors import whole_sites
from deltacontrol.deltas.interop.fields import COMMON, LAYERS, TARGETS, Field
from deltacontrol.deltas.interop.format import Attached, Description, Format, Plan, Slot, shared
from deltacontrol.deltas.interop.targets import (
    as_sites,
    by_pattern,
    grouped,
    short_names,
    targets,
    to_patterns,
)
from deltacontrol.theory.errors import InputError

DROPS = "it drops parts of the change while training, which this delta does not"
NO_DROPS = Field(0.0, only=(0.0, 0), why=DROPS)
FLAG = Field(False, "true or false")
SIZE = Field(8, "a positive integer")
NAMES = {**COMMON, **TARGETS, **LAYERS}


def biases(*words: str) -> Field:
    """The field ``bias`` of a format with these words for the biases of the targeted modules."""
    return Field("none", only=("none", "all", *words), why="peft has no other")


class ModuleFormat(Format):
    """One delta class at whole linear modules.

    Class attributes:
        kind: the delta.
        same: field of the configuration → field of the delta, one value for all modules.
        patterned: the same, where the named field of patterns holds other values by module.
        dotted: a pattern is for what stands behind a dot of the path, and has no ^.
        linear_only: peft acts at Linear modules alone, not at Conv1D.
    """

    kind: ClassVar[type[Delta]]
    same: ClassVar[Mapping[str, str]] = {}
    patterned: ClassVar[Mapping[str, tuple[str, str]]] = {}
    linear_only: ClassVar[bool] = False
    dotted: ClassVar[bool] = False

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """One delta for each set of values."""
        paths = targets(config, host)
        if self.linear_only:
            self._check_linear(paths, host)
        values: dict[str, tuple[Any, ...]] = dict.fromkeys(paths, ())
        for field, (patterns, _) in self.patterned.items():
            own = config[patterns] or {}
            found = by_pattern(own, paths, config[field], dotted=self.dotted)
            values = {path: (*row, found[path]) for path, row in values.items()}
        deltas: list[Delta] = []
        slots: list[Slot] = []
        names = [name for _, name in self.patterned.values()]
        for row, members in grouped(values).items():
            own = dict(zip(names, row, strict=True))
            kind: Any = self.kind
            delta = kind(sites=as_sites(members, host), **self.fields_of(config), **own)
            deltas.append(delta)
            for path in members:
                slots += self.slots(delta, Site(path, host.sites.modules[path]))
        return Plan(deltas, slots, paths)

    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """The fields of the deltas, and the controls under their modules."""
        sites = whole_sites(attached, host)
        if self.linear_only:
            self._check_linear(list(sites), host)
        config: dict[str, Any] = {
            "target_modules": short_names(list(sites), host.sites.modules),
            **self.config_of(attached),
        }
        for field, (patterns, name) in self.patterned.items():
            values = {path: _plain(getattr(item.delta, name)) for path, item in sites.items()}
            config[field] = next(iter(values.values()))
            config[patterns] = to_patterns(values, config[field], dotted=self.dotted)
        controls = {
            key: value
            for path, item in sites.items()
            for key, value in item.controls.items()
            if key.startswith(path + ".")
        }
        return Description(config, controls, list(sites))

    def fields_of(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of the delta that are the same at all modules."""
        return {name: config[field] for field, name in self.same.items()}

    def config_of(self, attached: Sequence[Attached]) -> dict[str, Any]:
        """The same fields in peft's words."""
        return {field: _plain(shared(attached, name)) for field, name in self.same.items()}

    @abstractmethod
    def slots(self, delta: Any, site: Site) -> list[Slot]:
        """The tensors of one module."""

    def slot(self, site: Site, leaf: str, control: str, *shape: int) -> Slot:
        """A tensor that is a control, in the shape ``shape`` (by the order of its entries)."""
        key = f"{self.root}{site.path}.{leaf}"
        return Slot(key, shape, (f"{site.path}.{control}",))

    def _check_linear(self, paths: Sequence[str], host: Host) -> None:
        odd = [path for path in paths if not isinstance(host.sites.modules[path], nn.Linear)]
        if odd:
            raise InputError(
                f"peft's {self.peft_type} acts at Linear modules alone, not at {', '.join(odd)} "
                f"({type(host.sites.modules[odd[0]]).__name__}); choose other sites, or lora."
            )


def _plain(value: Any) -> Any:
    return whole(value) if isinstance(value, float) else value
