"""Paths of low rank: beside a linear map, where they may wait for data, and beside a table."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from deltacontrol.deltas.editing.paths import WeightPath
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.methods.parts.data_starts import unseen


class LowRankPath(WeightPath):
    """ΔW = s·B A, or s·(B A - B₀ A₀) where the start is ``fixed``; A (rank, in), B (out, rank).

    A₀ and B₀ are not saved where they follow from the base weight, and only their product matters,
    which the signs of singular vectors leave alone. Where a path ``waits`` for data they are, and
    with them whether it has ``started``.
    """

    A_0: Tensor | None
    B_0: Tensor | None
    started: Tensor | None

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        scale: float,
        site: Site,
        dropout: float = 0.0,
        *,
        fixed: bool = False,
        waits: bool = False,
    ) -> None:
        super().__init__(site, dropout)
        self.A = nn.Parameter(down.contiguous())  # parts of a decomposition often are not, and a
        self.B = nn.Parameter(up.contiguous())  # file of safetensors takes no others
        self.scale = scale
        self.register_buffer("A_0", self.A.detach().clone() if fixed else None, persistent=waits)
        self.register_buffer("B_0", self.B.detach().clone() if fixed else None, persistent=waits)
        self.register_buffer("started", torch.tensor(False) if waits else None)

    @torch.no_grad()
    def start(self, down: Tensor, up: Tensor) -> None:
        """Put a path that waited at its start."""
        self.A.copy_(down)
        self.B.copy_(up)
        if self.A_0 is not None and self.B_0 is not None:
            self.A_0.copy_(self.A)
            self.B_0.copy_(self.B)
        if self.started is not None:
            self.started.fill_(True)

    @torch.no_grad()
    def forget_start(self) -> None:
        """Make all factors zero, so that the path adds nothing and waits again."""
        for value in (self.A, self.B, self.A_0, self.B_0, self.started):
            if value is not None:
                value.zero_()

    def weight(self) -> Tensor:
        """s·B A, less its start where that is not zero.

        Raises:
            InputError: the path still waits for data.
        """
        if self.started is not None and not bool(self.started):
            raise unseen("lora")
        change = self.B @ self.A
        if self.A_0 is not None and self.B_0 is not None:
            change = change - self.B_0 @ self.A_0
        return self.scale * change

    def through(self, x: Tensor) -> Tensor:
        """ΔW x, by way of r features."""
        change = linear(linear(x, self.A) * self.scale, self.B)
        if self.A_0 is not None and self.B_0 is not None:
            change = change - linear(linear(x, self.A_0) * self.scale, self.B_0)
        return change


class EmbeddingPath(nn.Module):
    """E(i) ↦ E(i) + s·B A e_i; A (rank, vocabulary), B (width, rank).

    An embedding that scales its output (Gemma's) scales the path with it.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float, module: nn.Embedding) -> None:
        super().__init__()
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(up)
        self.scale = scale
        self.__dict__["module"] = module  # the base's own: no submodule

    def forward(self, inputs: tuple, output: Tensor) -> Tensor:
        """The embedded tokens with the path's contribution added."""
        change = linear(embedding(inputs[0], self.A.T), self.B) * self.scale
        gain = getattr(self.__dict__["module"], "embed_scale", None)
        return output + (change if gain is None else change * gain)

    def merged(self, weight: Tensor) -> Tensor:
        """The table (vocabulary, width) with the change, in float64."""
        change = self.B.detach().double() @ self.A.detach().double()
        return weight + self.scale * change.T
