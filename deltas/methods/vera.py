"""VeRA: one frozen random low-rank pair for all layers, scaled by trained vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import WeightPath, check_dropout, lay
from deltacontrol.deltas.editing.sites import Site


@dataclass(frozen=True)
class VeRA(Delta):
    """W + diag(b) B diag(d) A with A, B random, frozen and shared (Kopiczko et al., Eq. 2).

    A ∈ R^{r×in} and B ∈ R^{out×r} are as wide as the widest site; a narrower one uses their first
    columns and rows. b starts at zero, so training starts at the base model. A checkpoint holds b,
    d and the seed of A and B.

    Attributes:
        rank: r; it may exceed the widths, because it costs r numbers a site.
        d_initial: start of d.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of the path while training.
        projection_seed: seed of A and B; None takes it from the seed of ``attach``.
    """

    rank: int = 256
    d_initial: float = 0.1
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    projection_seed: int | None = None

    name = "vera"
    default_rate = 1e-2
    searched_rates = (3e-3, 1e-2, 3e-2, 1e-1)
    category = "reparametrisation"
    law = "x (W + A diag(d) B diag(b))"
    reference = "Kopiczko, Blankevoort, Asano, ICLR 2024, Eq. 2"
    bibtex = r"""
        @inproceedings{kopiczko2024vera,
          author = {Kopiczko, Dawid J. and Blankevoort, Tijmen and Asano, Yuki M.},
          title = {{VeRA}: Vector-based Random Matrix Adaptation},
          booktitle = {International Conference on Learning Representations},
          year = {2024},
        }
    """
    num_parameters_formula = "sum over sites of r + d_out"

    def __post_init__(self) -> None:
        """Check rank and dropout."""
        self._positive("rank")
        check_dropout(self.name, self.dropout)

    def build(self, host: Host) -> None:
        """Add a path at every site, all with the same A and B."""
        sites = host.find(self.sites, self.layers)
        seed = host.draw_seed() if self.projection_seed is None else self.projection_seed
        widths = max(s.in_features for s in sites), max(s.out_features for s in sites)
        pair = SharedPair(self.rank, *widths, seed)
        host.add("shared", pair, like=host.weight(sites[0]))
        for site in sites:
            lay(host, site, ScaledPath(pair, self, site))

    def num_parameters(self, host: Host) -> int:
        """Σ r + d_out."""
        sites = host.find(self.sites, self.layers)
        return sum(self.rank + site.out_features for site in sites)


class SharedPair(nn.Module):
    """A (r, in) uniform in ±√(6/in) and B (out, r) in ±√(6/r), drawn from a seed that is saved."""

    def __init__(self, rank: int, in_features: int, out_features: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {"A": (rank, in_features), "B": (out_features, rank)}
        for name, shape in shapes.items():
            matrix = nn.init.kaiming_uniform_(torch.empty(shape), generator=generator)
            self.register_buffer(name, matrix, persistent=False)
        self.register_buffer("seed", torch.tensor(seed))


class ScaledPath(WeightPath):
    """ΔW = diag(b) B diag(d) A; shapes: b (out,), d (r,)."""

    def __init__(self, pair: SharedPair, config: VeRA, site: Site) -> None:
        super().__init__(site, config.dropout)
        self.b = nn.Parameter(torch.zeros(site.out_features))
        self.d = nn.Parameter(torch.full((config.rank,), config.d_initial))
        self.in_features = site.in_features
        self.pair = (pair,)  # in a tuple: registered once, for all sites

    def _matrices(self) -> tuple[Tensor, Tensor]:
        (pair,) = self.pair
        assert isinstance(pair.A, Tensor) and isinstance(pair.B, Tensor)
        return pair.A[:, : self.in_features], pair.B[: len(self.b)]

    def weight(self) -> Tensor:
        """diag(b) B diag(d) A."""
        down, up = (matrix.to(self.b.dtype) for matrix in self._matrices())
        return (self.b[:, None] * up) @ (self.d[:, None] * down)

    def through(self, x: Tensor) -> Tensor:
        """ΔW x, by way of r features."""
        down, up = self._matrices()
        return self.b * linear(self.d * linear(x, down), up)
