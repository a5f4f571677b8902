"""Prefixes enter through the attention interface of transformers, not through the model's code.

`Interception` switches a model from the implementation "sdpa" (or "eager") to a registered one that
puts prefix keys and values in front where a module has some, and then calls the stock function.
Without a prefix the result is the stock model's, exactly. Each configuration in the model is
switched from its own implementation, as an encoder may have another one than its decoder, or a
layer another one than its model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltacontrol.theory.errors import InputError

_NAME = "deltacontrol_"
_SLOT = "deltacontrol_prefixes"
_STOCK = ("eager", "sdpa")


class Prefix(Protocol):
    """Gives prefix keys and values, each of shape (heads of keys, length, head width).

    Or (batch, heads of keys, length, head width), where they differ from row to row. It may have a
    method ``gate`` besides, which gives factors (batch, queries): a query then sees the keys and
    values times its own factor.
    """

    def __call__(self) -> tuple[Tensor, Tensor]: ...  # noqa: D102


def add_prefix(module: nn.Module, prefix: Prefix) -> Callable[[], None]:
    """Attach a prefix to an attention module; returns what takes it off again.

    Raises:
        InputError: the module's own implementation is none that was switched.
    """
    config: Any = getattr(module, "config", None)
    if config is not None and not _is_switched(config):
        raise _no_masks(config._attn_implementation)
    slot = module.__dict__.setdefault(_SLOT, [])  # not a submodule: the base tree stays as it is
    slot.append(prefix)

    def remove() -> None:
        slot.remove(prefix)
        if not slot:
            module.__dict__.pop(_SLOT, None)

    return remove


class Interception:
    """Routes a model's attention through this file.

    Args:
        model: the base model.

    Raises:
        InputError: the model cannot change its attention, uses a kernel without masks, or shares
            its configuration object with another model that carries a prefix.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        configs = _configurations(model)
        if any(_is_switched(config) for config in configs):
            raise InputError(
                "this model shares its configuration object with a model that carries a prefix; "
                "build it from a copy of the configuration, or detach the other model's deltas "
                "first."
            )
        if not model._can_set_attn_implementation():
            raise InputError(
                f"{type(model).__name__} does not use the attention interface of transformers, so "
                "a prefix cannot enter it. Use prompt tuning, or another delta."
            )
        if model.config._attn_implementation not in _STOCK:
            raise _no_masks(model.config._attn_implementation)
        found = [(config, config._attn_implementation) for config in configs]
        self._stock = [(config, name) for config, name in found if name in _STOCK]
        self._switch()

    def _switch(self) -> None:
        for config, name in self._stock:
            config._attn_implementation_internal = _NAME + name

    def undo(self) -> None:
        """Give every configuration its own implementation back."""
        for config, name in self._stock:
            config._attn_implementation_internal = name

    def step_aside(self) -> Callable[[], None]:
        """Undo for a while; returns what switches again."""
        self.undo()
        return self._switch


def _is_switched(config: Any) -> bool:
    return str(config._attn_implementation).startswith(_NAME)


def _no_masks(name: Any) -> InputError:
    return InputError(
        f"prefixes work with the attention implementations eager and sdpa, not {name!r}; load the "
        "model with attn_implementation='sdpa'."
    )


def _configurations(model: PreTrainedModel) -> list[Any]:
    """Every configuration object by which attention of a model is chosen, each once.

    Those of its modules, which may be their own, and the parts of each. Not those of a part that
    does not use the attention interface.
    """
    found: dict[int, Any] = {}
    fixed: set[int] = set()

    def note(config: Any) -> None:
        if hasattr(config, "_attn_implementation_internal") and id(config) not in found:
            found[id(config)] = config
            for name in config.sub_configs:
                note(getattr(config, name, None))

    note(model.config)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and not module._can_set_attn_implementation():
            fixed.add(id(module.config))
        note(getattr(module, "config", None))
    return [c for key, c in found.items() if key not in fixed or c is model.config]


def _extended_mask(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, length: int,
                   is_causal: bool | None) -> Tensor | None:  # fmt: skip
    """The mask with ``length`` always visible columns in front."""
    if mask is not None:
        return pad(mask, (length, 0), value=True if mask.dtype == torch.bool else 0.0)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries, keys = query.shape[2], key.shape[2]
    if not causal or queries == 1:
        return None
    visible = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
    return pad(visible.tril(keys - queries), (length, 0), value=True)[None, None]


def _attention(stock: str) -> Callable[..., Any]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        head_width, gates = value.shape[-1], []
        for prefix in module.__dict__.get(_SLOT, ()):
            prefix_key, prefix_value = prefix()
            length = prefix_key.shape[-2]
            is_causal = kwargs.get("is_causal") if stock == "sdpa" else False
            attention_mask = _extended_mask(module, query, key, attention_mask, length, is_causal)
            if kwargs.get("position_bias") is not None:
                kwargs["position_bias"] = pad(kwargs["position_bias"], (length, 0))
            batch = (key.shape[0], -1, -1, -1)
            own = prefix_key.shape[-1]
            if hasattr(prefix, "gate"):
                # Features of its own, in which the query is scaled and the text has none.
                if kwargs.get("scaling") is None:
                    kwargs["scaling"] = own**-0.5
                gates.append(prefix.gate().to(query.dtype)[:, :, None, None])
                scaled = gates[-1].transpose(1, 2) * query[..., :own]
                query, key = torch.cat([query, scaled], dim=-1), pad(key, (0, own))
                prefix_key = pad(prefix_key, (key.shape[-1] - own, 0))
                prefix_value = pad(prefix_value, (value.shape[-1], 0))
                value = pad(value, (0, head_width))
            else:
                prefix_key = pad(prefix_key, (0, key.shape[-1] - own))
                prefix_value = pad(prefix_value, (0, value.shape[-1] - head_width))
            key = torch.cat([prefix_key.to(key.dtype).expand(batch), key], dim=2)
            value = torch.cat([prefix_value.to(value.dtype).expand(batch), value], dim=2)
        if stock == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            function = ALL_ATTENTION_FUNCTIONS[stock]
        output, weights = function(module, query, key, value, attention_mask, **kwargs)
        if gates:
            output, *parts = output.split(head_width, dim=-1)
            output = output + sum(g * part for g, part in zip(gates, parts, strict=True))
        return output, weights

    return forward


for _stock in _STOCK:
    AttentionInterface.register(_NAME + _stock, _attention(_stock))
    AttentionMaskInterface.register(_NAME + _stock, ALL_MASK_ATTENTION_FUNCTIONS[_stock])
