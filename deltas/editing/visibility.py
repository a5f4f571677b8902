"""Which tokens may mix: what a block's own attention lets each of its tokens see.

A control that mixes tokens must not look at padding, nor, in a causal model, at later tokens. The
block says which those are: by the mask that it receives, or, where it receives none, by being
causal or not. In generation with a cache the earlier tokens are not there any more, so whatever a
control needs of them is kept in the same cache, where beam search reorders it with the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.theory.errors import InputError

_SLOTS = "deltacontrol_slots"
_ENCODERS = ("mpnet",)  # that do not say that they are not causal
_TRUE_HIDES = ("mpt",)  # in whose boolean masks True says hidden


@dataclass(frozen=True)
class _Call:
    """What a block was called with: shape (batch, tokens), attention mask, cache."""

    shape: tuple[int, int]
    mask: Tensor | None
    cache: Cache | None


class Visibility:
    """The tokens that each token of a block sees, in the present pass.

    Args:
        host: the model.
        block: the block's site.

    Raises:
        InputError: the block has no attention.
    """

    def __init__(self, host: Host, block: Site) -> None:
        self.block = block
        said = [m.is_causal for m in block.module.modules() if hasattr(m, "is_causal")]
        self.causal = any(said)
        self.says_so = bool(said) or host.sites.model_type in _ENCODERS
        self.inverted = host.sites.model_type in _TRUE_HIDES
        if not said and "attention" not in host.sites.sites_of(block.path).places:
            raise InputError(
                f"{block.path} of {host.sites.model_type} has no attention, so which tokens may be "
                "mixed there is not known; choose a delta that mixes none, such as lora."
            )
        parameters = list(signature(type(block.module).forward).parameters.values())[1:]
        self._names = [p.name for p in parameters if p.kind is not Parameter.VAR_KEYWORD]
        self._carried = host.carry()
        host.on_call(block.module, self._note)

    def _note(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        state = given[self._names[0]]
        mask = given.get("attention_mask")
        cache = given.get("past_key_values", given.get("layer_past"))
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        module = self.block.module
        if module.training and getattr(module, "gradient_checkpointing", False):
            cache = None  # the block drops it, because its forward runs twice
        self._carried.value = _Call(state.shape[:2], mask, cache)
        return args, kwargs

    @property
    def _call(self) -> _Call:
        return self._carried.value

    def rows(self, state: Tensor) -> Tensor:
        """(batch, tokens, …) of a state whose first two dimensions a block may have flattened."""
        return state.unflatten(0, self._call.shape) if state.dim() == 2 else state

    def keep(self, tokens: Tensor, key: str) -> Tensor:
        """All tokens up to now, (batch, seen, width), of the new ones (batch, tokens, width).

        Args:
            tokens: what a control computed for the new tokens.
            key: the control's own name in the cache.

        Raises:
            InputError: the cache has a fixed length.
        """
        cache = self._call.cache
        if cache is None:
            return tokens
        if any(getattr(layer, "is_compileable", False) for layer in cache.layers):
            raise InputError(
                "a control that mixes tokens needs a cache that grows; in generation use "
                "cache_implementation='dynamic' or use_cache=False."
            )
        slots: dict[str, int] = cache.__dict__.setdefault(_SLOTS, {})
        if key not in slots:
            slots[key] = len(cache.layers)
            cache.layers.append(DynamicLayer())
        new = tokens.unsqueeze(1)
        kept = cache.update(new, new[..., :0], slots[key])[0].squeeze(1)
        mask = self._call.mask  # shorter where the attention forgets behind a sliding window
        return kept[:, -mask.shape[-1] :] if isinstance(mask, Tensor) else kept

    def seen(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Boolean (batch or 1, queries, keys): True where a query may look at a key.

        Raises:
            InputError: the mask is of a kind that says nothing about single tokens, or there is
                none and the block does not say whether it is causal.
        """
        mask = self._call.mask
        visible = torch.ones(1, queries, keys, dtype=torch.bool, device=device)
        if self.causal:
            visible = visible.tril(keys - queries)
        of_tokens = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2] == queries
        if not of_tokens and not self.says_so:
            raise InputError(
                f"{self.block.path} received no attention mask for each query and does not say "
                "whether it is causal, so which tokens may be mixed is not known; load the model "
                "with attn_implementation='eager', or choose another delta."
            )
        if mask is None:
            return visible
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return visible & mask.bool()[:, None, -keys:]
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != keys:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(
                f"{self.block.path} received the attention mask {shape}, from which the {keys} "
                "tokens to mix cannot be told; load the model with attn_implementation='sdpa'."
            )
        mask = mask[:, 0]
        if mask.is_floating_point():
            return visible & (mask > torch.finfo(mask.dtype).min / 2)
        mask = mask.bool()
        return visible & (~mask if self._true_hides(mask) else mask)

    def _true_hides(self, mask: Tensor) -> bool:
        """What True says in a boolean mask (batch, queries, keys): visible, or hidden as in MPT.

        A mask of padding alone has equal rows, and a causal one hides the later keys. So rows that
        are not equal and are True at all later keys hide by it; a query alone sees itself.
        """
        if self.inverted or self.says_so:
            return self.inverted
        queries, keys = mask.shape[-2:]
        if queries == 1:
            return not bool(mask[..., -1].any())
        earlier = torch.ones(queries, keys, dtype=torch.bool, device=mask.device)
        later = ~earlier.tril(keys - queries)
        return bool(mask[:, later].all()) and not torch.equal(mask[:, :1].expand_as(mask), mask)
