"""Trainable tokens: the rows of a few tokens in the table of embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class TrainableTokens(Delta):
    """E_i ↦ E_i + u_i for chosen tokens i, wherever the table E acts.

    The change is of the parameter, so a head that is tied to the table changes with it. u starts at
    zero, so training starts at the base model.

    Attributes:
        tokens: indices of the tokens, each once.
    """

    tokens: tuple[int, ...] = ()

    name = "trainable-tokens"
    acts_on = "rows of the embedding"
    category = "specification"
    law = "E_i + u_i for chosen tokens i"
    reference = "rows of the table that prompts extend (Lester, Al-Rfou, Constant, EMNLP 2021)"
    bibtex = r"""
        @inproceedings{lester2021power,
          author = {Lester, Brian and Al-Rfou, Rami and Constant, Noah},
          title = {The Power of Scale for Parameter-Efficient Prompt Tuning},
          booktitle = {Conference on Empirical Methods in Natural Language Processing},
          year = {2021},
        }
    """
    num_parameters_formula = "k d_embedding for k tokens"

    def __post_init__(self) -> None:
        """Check the tokens."""
        if len(set(self.tokens)) < len(self.tokens) or any(token < 0 for token in self.tokens):
            raise InputError(
                f"trainable-tokens: tokens are {self.tokens}; expected different indices from 0."
            )

    @classmethod
    def example(cls) -> TrainableTokens:
        """Tokens from 3 to 39: most texts have some."""
        return cls(tuple(range(3, 40)))

    def build(self, host: Host) -> None:
        """Let the table be a function of its chosen rows."""
        name = self.table(host)
        rows = TableRows(host.parameter(name), self.tokens)
        host.add("rows", rows, like=host.parameter(name))
        host.shared.append(f"{host.namespace}.rows.u")
        host.reparametrise([name], lambda: {name: rows()})

    def num_parameters(self, host: Host) -> int:
        """K d."""
        return len(self.tokens) * host.parameter(self.table(host)).shape[1]

    def table(self, host: Host) -> str:
        """The name of the table; InputError where there is none, or it lacks a token."""
        size = len(host.embedding_weight)
        if not self.tokens or max(self.tokens) >= size:
            raise InputError(
                f"trainable-tokens: tokens are {self.tokens}; expected at least one index from 0 "
                f"to {size - 1}."
            )
        return f"{host.sites.embedding_path}.weight"


class TableRows(nn.Module):
    """E + Σ e_i u_i'; u (k, width)."""

    places: Tensor

    def __init__(self, table: Tensor, tokens: tuple[int, ...]) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(len(tokens), table.shape[1]))
        self.table = (table,)  # in a tuple: the base's own
        self.register_buffer("places", torch.tensor(tokens), persistent=False)

    def forward(self) -> Tensor:
        """The table with the changed rows."""
        (table,) = self.table
        table = table.detach()
        return table.index_add(0, self.places, self.u.to(table.dtype))
