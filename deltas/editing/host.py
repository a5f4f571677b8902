"""What a delta's ``build`` receives: a model to look at, to edit, and to ask the training for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from deltacontrol.deltas.editing.edits import Edits
from deltacontrol.deltas.editing.queries import Queries
from deltacontrol.deltas.editing.requests import Requests


class Host:
    """A model that deltas are being attached to; the one way a delta may touch it.

    The three parts lie in files of their own, and the host answers for them by the same names:
    `deltacontrol.deltas.editing.queries.Queries` (what the model looks like),
    `deltacontrol.deltas.editing.edits.Edits` (what may be done to it, undoable bit for bit),
    `deltacontrol.deltas.editing.requests.Requests` (what a delta asks of the training). Only
    initial values, from one seeded generator, are its own.

    Args:
        model: the base model.
        seed: seed of the controllers' initial values.
    """

    def __init__(self, model: PreTrainedModel, seed: int = 0) -> None:
        self.queries = queries = Queries(model)
        self.edits = edits = Edits(queries)
        self.requests = requests = Requests(edits.controls)
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

        self.model, self.sites = queries.model, queries.sites
        self.find, self.weight, self.like = queries.find, queries.weight, queries.like
        self.parameter_names, self.parameter = queries.parameter_names, queries.parameter
        self.distinct, self.original, self.tied = queries.distinct, queries.original, queries.tied

        self.controls, self.state_path, self.shared = edits.controls, edits.state_path, edits.shared
        self.replaced, self.merges = edits.replaced, edits.merges
        self.add, self.replace, self.reparametrise = edits.add, edits.replace, edits.reparametrise
        self.on_output, self.on_call, self.carry = edits.on_output, edits.on_call, edits.carry
        self.add_prefix, self.on_merge = edits.add_prefix, edits.on_merge
        self.controlled, self.undo = edits.controlled, edits.undo

        self.rate_factors, self.scale_rate = requests.rate_factors, requests.scale_rate
        self.on_data, self.add_penalty = requests.on_data, requests.add_penalty
        self.on_step = requests.on_step

    @property
    def namespace(self) -> str:
        """The first part of the names of the controls of the delta that is being built."""
        return self.edits.namespace

    @namespace.setter
    def namespace(self, namespace: str) -> None:
        self.edits.namespace = self.requests.namespace = namespace

    @property
    def config(self) -> Any:
        """The model's configuration (of its text part, where there are several)."""
        return self.queries.config

    @property
    def width(self) -> int:
        """Width of the token embeddings; raises as `Queries.embedding_weight` does."""
        return self.queries.width

    @property
    def embedding_weight(self) -> Tensor:
        """The matrix of token embeddings, (vocabulary, width); see `Queries.embedding_weight`."""
        return self.queries.embedding_weight

    def backbone_names(
        self, sites: Iterable[str] | None = None, layers: Iterable[int] | None = None
    ) -> list[str]:
        """As `Queries.backbone_names`; an error names the delta that is being built."""
        return self.queries.backbone_names(sites, layers, method=self.namespace)

    def normal(self, *shape: int, std: float) -> Tensor:
        """Gaussian initial values, from this host's generator."""
        return torch.randn(*shape, generator=self.generator) * std

    def kaiming(self, rows: int, columns: int) -> Tensor:
        """Uniform initial values in ±1/√columns, from this host's generator."""
        return nn.init.kaiming_uniform_(
            torch.empty(rows, columns), a=math.sqrt(5), generator=self.generator
        )

    def draw_seed(self) -> int:
        """A seed for random constants, from this host's generator."""
        return int(torch.randint(2**31, (), generator=self.generator))
