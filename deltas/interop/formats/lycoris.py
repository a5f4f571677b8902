"""LOHA and LOKR: changes of weight as Hadamard and Kronecker products."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.interop.adapter import whole
from deltacontrol.deltas.interop.factors import features, whole_sites
from deltacontrol.deltas.interop.fields import COMMON, LAYERS, PATTERNS, TARGETS, Field
from deltacontrol.deltas.interop.format import Attached, Description, Format, Plan, Slot, shared
from deltacontrol.deltas.interop.targets import (
    as_sites,
    by_pattern,
    grouped,
    short_names,
    targets,
    to_patterns,
)
from deltacontrol.deltas.methods.loha import LoHa
from deltacontrol.deltas.methods.lokr import LoKr
from deltacontrol.theory.errors import InputError

_DROPS = "it drops parts of the change while training, which this delta does not"
_FIELDS = {
    **COMMON,
    **TARGETS,
    **LAYERS,
    **PATTERNS,
    "r": Field(8, "a positive integer"),
    "alpha": Field(8, "a number"),
    "rank_dropout": Field(0.0, only=(0.0, 0), why=_DROPS),
    "module_dropout": Field(0.0, only=(0.0, 0), why=_DROPS),
    "use_effective_conv2d": Field(False, "true or false"),  # for convolutions alone
}


class LycorisFormat(Format):
    """What the two have in common: a rank and an α for each module, linear maps only."""

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """One delta for each rank and α."""
        paths = targets(config, host)
        odd = [path for path in paths if not isinstance(host.sites.modules[path], nn.Linear)]
        if odd:
            raise InputError(
                f"peft's {self.peft_type} acts at Linear modules alone, not at {', '.join(odd)} "
                f"({type(host.sites.modules[odd[0]]).__name__}); choose other sites, or lora."
            )
        ranks = by_pattern(config["rank_pattern"] or {}, paths, config["r"])
        alphas = by_pattern(config["alpha_pattern"] or {}, paths, config["alpha"])
        groups = grouped({path: (ranks[path], float(alphas[path])) for path in paths})
        deltas = []
        slots: list[Slot] = []
        for (rank, alpha), members in groups.items():
            delta = self.delta(config, rank, alpha, as_sites(members, host))
            deltas.append(delta)
            for path in members:
                slots += self.slots(delta, path, host)
        return Plan(deltas, slots, paths)

    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """A rank and an α for each module."""
        sites = whole_sites(attached, host)
        ranks = {path: item.delta.rank for path, item in sites.items()}
        alphas = {path: whole(item.delta.alpha) for path, item in sites.items()}
        rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
        controls = {
            key: value
            for path, item in sites.items()
            for key, value in item.controls.items()
            if key.startswith(path + ".")
        }
        config = {
            "target_modules": short_names(list(sites), host.sites.modules),
            "r": rank,
            "alpha": alpha,
            "rank_pattern": to_patterns(ranks, rank),
            "alpha_pattern": to_patterns(alphas, alpha),
        }
        return Description(config | self.own_fields(attached), controls, list(sites))

    @abstractmethod
    def delta(
        self, config: Mapping[str, Any], rank: int, alpha: float, sites: tuple[str, ...]
    ) -> LoHa | LoKr:
        """The delta of these modules."""

    @abstractmethod
    def slots(self, delta: Any, path: str, host: Host) -> list[Slot]:
        """The tensors of one module."""

    def own_fields(self, attached: Sequence[Attached]) -> dict[str, Any]:
        """Fields that the other format has not."""
        return {}


class LohaFormat(LycorisFormat):
    """ΔW = (α/r)·(w1_a w1_b) ⊙ (w2_a w2_b)."""

    peft_type = "LOHA"
    fields = {**_FIELDS, "init_weights": Field(True, "true or false")}
    writes = (LoHa,)

    def delta(
        self, config: Mapping[str, Any], rank: int, alpha: float, sites: tuple[str, ...]
    ) -> LoHa:
        """A LoHa."""
        return LoHa(rank=rank, alpha=alpha, sites=sites)

    def slots(self, delta: LoHa, path: str, host: Host) -> list[Slot]:
        """X and Y of both factors."""
        wide, narrow = features(path, host)
        shapes = {"a": (narrow, delta.rank), "b": (delta.rank, wide)}
        return [
            Slot(f"{self.root}{path}.hada_w{i}_{end}", shapes[end], (f"{path}.{name}_{i}",))
            for i in (1, 2)
            for end, name in (("a", "X"), ("b", "Y"))
        ]


class LokrFormat(LycorisFormat):
    """ΔW = (α/r)·w1 ⊗ w2, each one matrix or the product w_a w_b."""

    peft_type = "LOKR"
    fields = {
        **_FIELDS,
        "decompose_both": Field(False, "true or false"),
        "decompose_factor": Field(-1, "an integer"),
        "rank_dropout_scale": Field(False, "true or false"),
        "init_weights": Field(True, only=(True, False, "lycoris"), why="peft has no other"),
    }
    writes = (LoKr,)

    def delta(
        self, config: Mapping[str, Any], rank: int, alpha: float, sites: tuple[str, ...]
    ) -> LoKr:
        """A LoKr."""
        factor = config["decompose_factor"]
        both = config["decompose_both"]
        return LoKr(
            rank=rank,
            alpha=alpha,
            factor=None if factor == -1 else factor,
            decompose_both=both,
            sites=sites,
        )

    def slots(self, delta: LoKr, path: str, host: Host) -> list[Slot]:
        """Both factors, whole or as products."""
        (site,) = [site for site in host.find((path,)) if site.path == path]
        slots = []
        for i, shapes in enumerate(delta.factor_shapes(site), start=1):
            ends = ("",) if len(shapes) == 1 else ("_a", "_b")
            for j, (end, shape) in enumerate(zip(ends, shapes, strict=True)):
                key = f"{self.root}{path}.lokr_w{i}{end}"
                slots.append(Slot(key, shape, (f"{path}.W_{i}.{j}",)))
        return slots

    def own_fields(self, attached: Sequence[Attached]) -> dict[str, Any]:
        """How the factors are cut."""
        factor = shared(attached, "factor")
        return {
            "decompose_factor": -1 if factor is None else factor,
            "decompose_both": shared(attached, "decompose_both"),
        }


FORMATS = (LohaFormat(), LokrFormat())
