"""Prompt tuning: trained rows in front of the input embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.positions import (
    first_position,
    usable_positions,
)
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class PromptTuning(Delta):
    """[P; E(x)]: extra rows of the initial state, no control after it (Lester et al., Section 2).

    The rows enter directly before the text: behind the padding, where there is some before it, so
    that it changes nothing, however the model counts distances. They are taken off again behind the
    backbone's last block, so that heads, pooling and token losses see the text's own positions.
    They start as embeddings of random tokens, or Gaussian; without training the model's output
    changes.

    Attributes:
        length: n, number of prompt positions.
        init: "vocabulary" (embeddings of random tokens) or "normal".
        init_std: standard deviation for ``init="normal"``.
        strip: take the rows off again; where they stay, a pooler of the first position reads the
            first row, and outputs have n more positions than the text, as in peft.
    """

    length: int = 16
    init: Literal["vocabulary", "normal"] = "vocabulary"
    init_std: float = 0.02
    strip: bool = True

    name = "prompt"
    look = ("prompt", "#CC79A7", "P", 6)
    acts_on = "input"
    default_rate = 1e-2
    category = "addition"
    law = "x_0 = [P; E(x)]"
    reference = "Lester, Al-Rfou, Constant, EMNLP 2021, Section 2"
    bibtex = r"""
        @inproceedings{lester2021power,
          author = {Lester, Brian and Al-Rfou, Rami and Constant, Noah},
          title = {The Power of Scale for Parameter-Efficient Prompt Tuning},
          booktitle = {Conference on Empirical Methods in Natural Language Processing},
          year = {2021},
        }
    """
    num_parameters_formula = "n d"
    unmergeable = "a prompt is no weight of the base model"
    identity_at_start = False

    @property
    def num_positions(self) -> int:
        """The prompt's length."""
        return self.length

    def __post_init__(self) -> None:
        """Check the length."""
        self._positive("length")

    def build(self, host: Host) -> None:
        """Insert the prompt before the backbone and take it off behind the blocks."""
        if self.init == "vocabulary":
            weight = host.embedding_weight
            tokens = torch.randint(weight.shape[0], (self.length,), generator=host.generator)
            with torch.no_grad():
                start = host.model.get_input_embeddings()(tokens.to(weight.device)).clone()
        else:
            start = host.normal(self.length, host.width, std=self.init_std)
        lay_prompt(host, start, strip=self.strip)

    def num_parameters(self, host: Host) -> int:
        """N d, d the width of the embeddings."""
        return self.length * host.width


def lay_prompt(
    host: Host,
    rows: Tensor,
    encoder: nn.Module | None = None,
    *,
    length: int | None = None,
    strip: bool = True,
) -> None:
    """Let rows (n, d), or what ``encoder`` makes of them, enter in front of the embedded text.

    ``length`` is n where the encoder takes something of another shape, and ``strip`` takes the rows
    off again behind the blocks.

    Raises:
        InputError: the model takes no embeddings in the place of tokens.
    """
    stack = _stack(host)
    path = host.sites.embedding_path or host.sites.backbone_path
    embedding = host.model.get_input_embeddings()
    limit = usable_positions(host.model)
    prompt = Prompt(rows, embedding, limit, first_position(stack), encoder, length)
    host.add(path, prompt, like=host.embedding_weight)
    host.on_call(stack, prompt.insert)
    if strip:  # last in, first out
        host.on_output(_exit(host, stack), prompt.strip, first=True)


def _exit(host: Host, stack: nn.Module) -> nn.Module:
    """The module behind which the rows leave: before a pooler, which must see the text."""
    if getattr(stack, "pooler", None) is None:
        return stack
    around = host.sites.modules[host.sites.block_paths[0].rsplit(".", 2)[0]]
    return host.sites.blocks[-1] if around is stack else around


def _stack(host: Host) -> nn.Module:
    """The innermost module around the blocks that takes embeddings.

    Not always the backbone: OPT's language model calls the decoder inside of it directly.
    """
    if host.model.config.is_encoder_decoder:
        return host.model.get_encoder()
    path = host.sites.block_paths[0]
    while path:
        path = path.rpartition(".")[0]
        module = host.sites.modules[path]
        if "inputs_embeds" in signature(module.forward).parameters:
            return module
    raise InputError(
        f"{type(host.model).__name__} takes no inputs_embeds, so a prompt cannot enter it; "
        "choose another delta, such as prefix."
    )


class Prompt(nn.Module):
    """Rows (n, d) that enter in front of the embedded text and leave behind the blocks.

    Args:
        rows: the start.
        embedding: the base's own token embedding.
        limit: how many positions prompt and text may have; None where there is no limit.
        first: the first of them that a token can have.
        encoder: makes the rows that enter of the trained ones; None means they are the same.
        length: n; None means as many as there are trained rows.
    """

    def __init__(
        self,
        rows: Tensor,
        embedding: nn.Module,
        limit: int | None,
        first: int,
        encoder: nn.Module | None = None,
        length: int | None = None,
    ) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.length = len(rows) if length is None else length
        self.encoder = encoder
        self.limit = limit
        self.first = first
        self.inserted = False
        self.total = 0  # positions of the present pass, prompt and text
        self.before: Tensor | None = None  # (batch, 1): padding before each text of the pass
        self.embed: Callable[[Tensor], Tensor] = embedding.__call__  # the base's own: no submodule

    def forward(self) -> Tensor:
        """The rows that enter, (n, d)."""
        return self.rows if self.encoder is None else self.encoder(self.rows)

    def insert(self, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The backbone's arguments with the prompt in front.

        Raises:
            InputError: prompt and text together are longer than the model's positions, or the mask
                is not of shape (batch, tokens).
        """
        if len(args) > 1:
            raise InputError("prompt tuning needs the backbone's arguments by keyword.")
        kwargs = dict(kwargs)
        tokens = args[0] if args else kwargs.pop("input_ids", None)
        length = self.length
        cache = kwargs.get("past_key_values")  # it holds the prompt from the first pass on
        self.inserted = cache is None or cache.get_seq_length() == 0
        if kwargs.get("inputs_embeds") is None:
            kwargs["inputs_embeds"] = self.embed(tokens)
        text = kwargs["inputs_embeds"]
        mask = kwargs.get("attention_mask")
        self.before = None
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise InputError(
                    "prompt tuning needs an attention mask of shape (batch, tokens); in generation "
                    "with a static cache there is none: use cache_implementation='dynamic'."
                )
            self.before = (mask.cumsum(-1) == 0).sum(-1, keepdim=True) % mask.shape[-1]
            kwargs["attention_mask"] = self._put(mask, mask.new_ones(length))
        if self.inserted:
            if self.limit is not None and text.shape[1] + length > self.limit:
                raise InputError(
                    f"a prompt of {length} and a text of {text.shape[1]} tokens are longer than "
                    f"the {self.limit} positions of the model; shorten max_length or the prompt."
                )
            kwargs["inputs_embeds"] = self._put(text, self().to(text.dtype))
            self.total = text.shape[1] + length
        positions = kwargs.get("position_ids")
        if positions is not None:
            shifted = positions + length
            start = torch.arange(self.first, self.first + length, device=positions.device)
            kwargs["position_ids"] = self._put(shifted, start) if self.inserted else shifted
        types = kwargs.get("token_type_ids")
        if types is not None and self.inserted:
            kwargs["token_type_ids"] = self._put(types, types.new_zeros(length))
        return (), kwargs

    def _put(self, values: Tensor, rows: Tensor) -> Tensor:
        """``values`` (batch or 1, tokens, …) with ``rows`` (n, …) before the text of each row."""
        batch = len(values) if self.before is None else len(self.before)
        values = values.expand(batch, *values.shape[1:])
        both = torch.cat([rows.expand(batch, *rows.shape), values], dim=1)
        if self.before is None:
            return both
        place = torch.arange(both.shape[1], device=both.device)
        # Padding first, which stands behind the rows in `both`, then the rows, then the text.
        moved = torch.where(place < self.before, place + self.length, place - self.before)
        return _rows(both, torch.where(place < self.before + self.length, moved, place))

    def strip(self, _inputs: tuple, state: Tensor) -> Tensor:
        """The state without the prompt's rows.

        Raises:
            InputError: the model does not keep one row for each position.
        """
        if not self.inserted:
            return state
        if state.shape[1] != self.total:
            raise InputError(
                f"{self.total} positions went in and {state.shape[1]} came out, so the prompt "
                "cannot be taken off again; choose another delta for this architecture."
            )
        if self.before is None:
            return state[:, self.length :]
        place = torch.arange(self.total - self.length, device=state.device)
        return _rows(state, torch.where(place < self.before, place, place + self.length))


def _rows(values: Tensor, places: Tensor) -> Tensor:
    """The rows of ``values`` (batch, tokens, …) at ``places`` (batch, new tokens)."""
    places = places.to(values.device)
    places = places.view(*places.shape, *[1] * (values.dim() - 2))
    return values.gather(1, places.expand(-1, -1, *values.shape[2:]))
