"""Positions of the text behind what deltas put in front of it.

`shift_positions` is for a prefix that counts as n positions, as in a cache. `count_from_text` is
for rows or keys in front of padding: a model with rotary positions sees distances alone, so that
padding before a text changes nothing, unless something in front of the padding is seen as well.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from deltacontrol.deltas.editing.host import Host
from deltacontrol.theory.errors import InputError

# Modules that are given positions, and what they are called in the models.
_TABLES = ("position_embeddings", "wpe")
_OPT = "embed_positions"
_ROTARY = "rotary_emb"


def usable_positions(model: nn.Module) -> int | None:
    """How many positions a text can have; None where there is no limit.

    RoBERTa and its kin count from behind the padding's index, so that the first ones are not used.
    """
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    return limit - first_position(model)


def first_position(stack: nn.Module) -> int:
    """The first position of a text: RoBERTa and its kin count from behind the padding's index."""
    for path, module in stack.named_modules():
        if path.endswith("position_embeddings"):
            padding = getattr(module, "padding_idx", None)
            return 0 if padding is None else padding + 1
    return 0


def shift_positions(host: Host, length: int) -> None:
    """Let every position of the text be ``length`` higher where the model looks it up.

    Raises:
        InputError: it is not known where positions enter this architecture.
    """
    found = False
    for path, module in host.sites.modules.items():
        name = path.rpartition(".")[2]
        if name in _TABLES and type(module) is nn.Embedding:
            # RoBERTa gives padding one position of its own, and text those behind it.
            padding = -1 if module.padding_idx is None else module.padding_idx
            shift = Shift(length, padding, module.num_embeddings - 1 - padding)
        elif name == _OPT and host.sites.model_type == "opt" and isinstance(module, nn.Embedding):
            shift = Shift(length, -1, module.num_embeddings - 2)  # two rows are for padding
        elif name == _ROTARY:
            shift = Shift(length, -1, None)
        else:
            continue
        host.on_call(module, shift)
        found = True
    if not found:
        raise InputError(
            f"where positions enter {host.sites.model_type} is not known, so they cannot start "
            "behind a prefix; leave shift=false."
        )


def count_from_text(host: Host) -> None:
    """Let each text have the positions 0, 1, …, whatever padding is before it.

    It acts in models with rotary positions alone, where the caller gives a mask and no positions.
    """
    if not any(path.rpartition(".")[2] == _ROTARY for path in host.sites.modules):
        return
    path = host.sites.block_paths[0]
    while path:
        path = path.rpartition(".")[0]
        module = host.sites.modules[path]
        if {"position_ids", "inputs_embeds"} <= signature(module.forward).parameters.keys():
            host.on_call(module, _with_positions)
            return


def _with_positions(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if len(args) > 1:
        raise InputError("with prompts and prefixes, give the model's arguments by name.")
    mask, given = kwargs.get("attention_mask"), kwargs.get("position_ids")
    state = args[0] if args else kwargs.get("input_ids")
    state = kwargs.get("inputs_embeds") if state is None else state
    if given is not None or not isinstance(mask, Tensor) or mask.dim() != 2 or state is None:
        return args, kwargs
    before = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    positions = (torch.arange(mask.shape[1], device=mask.device) - before).clamp_min(0)
    return args, kwargs | {"position_ids": positions[:, -state.shape[1] :]}


class Shift:
    """Adds to the positions that a module is called with; those up to padding's stay.

    Args:
        length: what is added.
        padding: the position of padding.
        limit: how many positions text can have; None means any number.
    """

    def __init__(self, length: int, padding: int, limit: int | None) -> None:
        self.length = length
        self.padding = padding
        self.limit = limit

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The module's arguments: the positions by name, or else the first integers."""
        if kwargs.get("position_ids") is not None:
            return args, kwargs | {"position_ids": self._moved(kwargs["position_ids"])}
        place = next(
            i for i, a in enumerate(args) if isinstance(a, Tensor) and not a.is_floating_point()
        )
        return (*args[:place], self._moved(args[place]), *args[place + 1 :]), kwargs

    def _moved(self, positions: Tensor) -> Tensor:
        total = positions.shape[-1] + self.length
        if self.limit is not None and total > self.limit:
            raise InputError(
                f"prefix and text come to {total} positions, but the model has {self.limit}; "
                "shorten max_length or the prefix, or leave shift=false."
            )
        return torch.where(positions > self.padding, positions + self.length, positions)
