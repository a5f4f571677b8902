"""IA3: gains on the output of linear maps, or on the input of those named as feed-forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.interop.factors import features
from deltacontrol.deltas.interop.fields import COMMON, TARGETS, Field
from deltacontrol.deltas.interop.format import Attached, Description, Format, Plan, Slot
from deltacontrol.deltas.interop.targets import as_sites, is_match, short_names, targets
from deltacontrol.deltas.methods.ia3 import IA3
from deltacontrol.theory.errors import InputError


class IA3Format(Format):
    """The file holds the gain l = 1 + u: (out, 1), or (1, in) for a feed-forward module."""

    peft_type = "IA3"
    fields = {
        **COMMON,
        **TARGETS,
        "feedforward_modules": Field(None, "a name or a list of names"),
        "fan_in_fan_out": Field(False, "true or false"),
        "init_ia3_weights": Field(True, "true or false"),
    }
    writes = (IA3,)

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """One IA3, its inputs the feed-forward modules."""
        rule, inner = config["target_modules"], config["feedforward_modules"] or []
        if isinstance(rule, list) and isinstance(inner, list) and set(inner) - set(rule):
            raise InputError(
                f"feedforward_modules {sorted(set(inner) - set(rule))} are not in target_modules."
            )
        paths = targets(config, host)
        inputs = _feed_forward(inner, paths)
        outputs = [path for path in paths if path not in inputs]
        delta = IA3(
            sites=as_sites(outputs, host) if outputs else (),
            input_sites=as_sites(inputs, host) if inputs else (),
        )
        slots = [self._slot(path, path in inputs, host) for path in paths]
        return Plan([delta], slots, paths)

    def _slot(self, path: str, is_input: bool, host: Host) -> Slot:
        wide, narrow = features(path, host)
        shape = (1, wide) if is_input else (narrow, 1)
        return Slot(
            f"{self.root}{path}.ia3_l",
            shape,
            (f"{path}.u",),
            split=lambda gain: (gain.flatten() - 1,),
            join=lambda controls: (1 + controls[0]).view(shape),
        )

    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """Gains at one module are multiplied; beside a slice the gain is one."""
        outputs: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}
        for item in attached:
            delta, controls = item.delta, item.controls
            for site in host.find(delta.sites, delta.layers) if delta.sites else []:
                gain = 1 + site.spread(controls[f"{site.key}.u"])
                outputs[site.path] = outputs.get(site.path, 1) * gain
            for site in host.find(delta.input_sites, delta.layers) if delta.input_sites else []:
                inputs[site.path] = inputs.get(site.path, 1) * (1 + controls[f"{site.key}.u"])
        if both := sorted(outputs.keys() & inputs.keys()):
            raise InputError(
                f"ia3 scales the input and the output of {', '.join(both)}; peft scales one of the "
                "two at a module."
            )
        gains = outputs | inputs
        inner = short_names(list(inputs), host.sites.modules)
        if set(_feed_forward(inner, list(gains))) != inputs.keys():
            inner = list(inputs)
        names = {*inner, *short_names(list(outputs), host.sites.modules)}
        config = {"target_modules": sorted(names), "feedforward_modules": inner}
        return Description(config, {f"{p}.u": g - 1 for p, g in gains.items()}, list(gains))


def _feed_forward(rule: str | Sequence[str], paths: Sequence[str]) -> list[str]:
    """The paths that peft takes for feed-forward: a name needs no dot before it."""
    if isinstance(rule, str):
        return [path for path in paths if is_match(rule, path)]
    return [path for path in paths if path.endswith(tuple(rule))]


FORMATS = (IA3Format(),)
