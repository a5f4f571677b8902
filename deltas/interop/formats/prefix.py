"""PREFIX_TUNING: keys and values in front of those of every layer, in one matrix.

The file holds (n, 2·layers·width), seen as (n, 2·layers, heads, head width): row 2i is the keys of
layer i, row 2i+1 its values. An MLP that made them is collapsed on saving. peft hands them over as
a cache, so that the text's positions start behind them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.interop.fields import COMMON, PROMPT, Field
from deltacontrol.deltas.interop.format import Attached, Description, Format, Plan, Slot, shared
from deltacontrol.deltas.interop.formats.prompt import ROWS, check_sizes, check_task
from deltacontrol.deltas.interop.targets import task_type
from deltacontrol.deltas.methods.prefix import PrefixTuning, key_value_heads
from deltacontrol.theory.errors import InputError


class PrefixFormat(Format):
    """One matrix for all layers."""

    peft_type = "PREFIX_TUNING"
    fields = {
        **COMMON,
        **PROMPT,
        "encoder_hidden_size": Field(None, "a positive integer"),
        "prefix_projection": Field(False, "true or false"),
        "init_weights": Field(None, "a text"),
    }
    writes = (PrefixTuning,)
    root = "base_model."

    def plan(self, config: Mapping[str, Any], host: Host) -> Plan:
        """One PrefixTuning with keys and values of its own."""
        check_task(config, host)
        _check_window(host)
        paths = [site.path for site in host.find(("attention",))]
        check_sizes(config, _sizes(host, paths))
        length = config["num_virtual_tokens"]
        heads, head_width = key_value_heads(host)
        shape = (length, 2 * len(paths), heads, head_width)

        def split(rows: Tensor) -> list[Tensor]:
            return [row.transpose(0, 1) for row in rows.view(shape).unbind(1)]

        def join(controls: Sequence[Tensor]) -> Tensor:
            return torch.stack([c.transpose(0, 1) for c in controls], dim=1).flatten(1)

        names = tuple(f"{path}.{leaf}" for path in paths for leaf in ("keys", "values"))
        slot = Slot(ROWS, (length, 2 * len(paths) * heads * head_width), names, split, join)
        return Plan([PrefixTuning(length=length, shift=True)], [slot], [])

    def describe(self, attached: Sequence[Attached], host: Host) -> Description:
        """The prefixes of a layer one behind the other, which attention does not tell apart."""
        if not shared(attached, "shift"):
            raise InputError(
                "peft's prefix is a cache, behind which the text's positions start; here they "
                "start at the first, so the outputs would change. Train with shift=true."
            )
        paths = [site.path for site in host.find(("attention",))]
        controls: dict[str, Tensor] = {}
        for path in paths:
            made = [_prefix(item, path)() for item in attached]
            for leaf, parts in zip(("keys", "values"), zip(*made, strict=True), strict=True):
                controls[f"{path}.{leaf}"] = torch.cat([p.detach().cpu() for p in parts], dim=1)
        config: dict[str, Any] = {
            "num_virtual_tokens": sum(item.delta.length for item in attached),
            "num_transformer_submodules": 1,
            **_sizes(host, paths),
        }
        inner = {item.delta.projection for item in attached}
        if len(inner) == 1 and None not in inner:
            config |= {"prefix_projection": True, "encoder_hidden_size": inner.pop()}
        check_task(config | {"task_type": task_type(host.model)}, host)
        return Description(config, controls)


def _check_window(host: Host) -> None:
    """Refuse layers whose window leaves a cached prefix behind; ours is always seen.

    Raises:
        InputError: the model has such layers.
    """
    config = host.config
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds or (not kinds and getattr(config, "sliding_window", None)):
        raise InputError(
            f"{host.sites.model_type} has layers with a sliding window, where peft's prefix goes "
            "out of sight as the text grows and a prefix here does not; exchange another delta."
        )


def _sizes(host: Host, paths: Sequence[str]) -> dict[str, int]:
    """The sizes of keys and values, which grouped queries share."""
    heads, head_width = key_value_heads(host)
    return {
        "token_dim": heads * head_width,
        "num_attention_heads": heads,
        "num_layers": len(paths),
    }


def _prefix(item: Attached, path: str) -> Any:
    """The controller of a layer.

    Raises:
        InputError: the delta leaves the layer out.
    """
    try:
        return item.tree.get_submodule(path)
    except AttributeError:
        raise InputError(
            f"the prefix leaves out {path}, but peft has one in every layer; train with all layers."
        ) from None


FORMATS = (PrefixFormat(),)
