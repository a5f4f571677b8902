"""VERA: trained vectors around one frozen random pair, which the file holds as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.interop.factors import features, whole_sites
from deltacontrol.deltas.interop.fields import COMMON, LAYERS, TARGETS, Field
from deltacontrol.deltas.interop.format import Attached, Description, Format, Plan, Slot
from deltacontrol.deltas.interop.targets import as_sites, short_names, targets
from deltacontrol.deltas.methods.vera import SharedPair, VeRA
from deltacontrol.theory.errors import InputError


class VeraFormat(Format):
    """ΔW = diag(b) B diag(d) A, where A and B are drawn from projection_prng_key."""

    peft_type = "VERA"
    fields = {
        **COMMON,
        "target_modules": TARGETS["target_modules"],
        **LAYERS,
        "r": Field(256, "a positive integer"),
        "projection_prng_key": Field(0, "an integer"),
        "save_projection": Field(True, "true or false"),
        "vera_dropout": Field(0.0, "a number"),
        "d_initial": Field(0.1, "a number"),
        "fan_in_fan_out": Field(False, "true or false"),
        "bias": Field("none", only=("none", "all", "vera_only"), why="peft has no other"),
        "init_weights": Field(True, "true or false"),
    }
    writes = (VeRA,)
    bias_word = "vera_only"

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """One VeRA; the pair of the file must be the one that the key gives."""
        paths = targets(config, host)
        rank, key = config["r"], config["projection_prng_key"]
        delta = VeRA(
            rank=rank,
            d_initial=config["d_initial"],
            sites=as_sites(paths, host),
            dropout=config["vera_dropout"],
            projection_seed=key,
        )
        widths = {path: features(path, host) for path in paths}
        slots = []
        for path, (_, narrow) in widths.items():
            slots += [
                Slot(f"{self.root}{path}.vera_lambda_b", (narrow,), (f"{path}.b",)),
                Slot(f"{self.root}{path}.vera_lambda_d", (rank,), (f"{path}.d",)),
            ]
        pair = SharedPair(
            rank, max(w for w, _ in widths.values()), max(n for _, n in widths.values()), key
        )
        matrices = {f"base_model.vera_{name}": pair.get_buffer(name) for name in ("A", "B")}
        required = set(matrices) if config["save_projection"] else set()
        return Plan([delta], slots, paths, constants=matrices, required=required)

    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """One VeRA at whole modules: a pair fits the widths of its own sites."""
        if len(attached) > 1:
            raise InputError("peft holds one vera in an adapter; export them one at a time.")
        delta, paths = attached[0].delta, list(whole_sites(attached, host))
        controls = {k: v for k, v in attached[0].controls.items() if k != "shared.seed"}
        config = {
            "target_modules": short_names(paths, host.sites.modules),
            "r": delta.rank,
            "projection_prng_key": int(attached[0].controls["shared.seed"]),
            "vera_dropout": delta.dropout,
            "d_initial": delta.d_initial,
        }
        return Description(config, controls, paths)


FORMATS = (VeraFormat(),)
