"""RandLoRA: a full-rank change from frozen random pairs, scaled by trained vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import WeightPath, check_dropout, lay
from deltacontrol.deltas.editing.sites import Site


@dataclass(frozen=True)
class RandLoRA(Delta):
    """W + (α/r)·Σ_k B_k Λ_k A_k Γ_k, A and B random, frozen and shared (Albert et al., Eq. 2).

    With n = ⌈min(d_in, d_out)/r⌉ pairs of rank r the change has full rank. B_k (max, r) is a pair's
    own, A (r, min) is one for all, Λ_k and Γ_k are diagonal; where the input is the wider side the
    change is transposed. As in peft, Λ is laid out the other way round than B: the f-th of all r n
    terms takes column (⌊f/r⌋, f mod r) of B and row (⌊f/n⌋, f mod n) of Λ A. Λ starts at zero, so
    training starts at the base model; Γ starts at 1/max(n, min).

    Attributes:
        rank: r. A smaller one means more parameters.
        alpha: α.
        bases: A and B are uniform, or of -1, 0 and 1 with a share 1/3 ("sparse") or 1/√min
            ("very-sparse") not zero; both are divided by their deviation.
        seed: of A and B.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of the path while training.
    """

    rank: int = 8
    alpha: float = 160.0
    bases: Literal["uniform", "sparse", "very-sparse"] = "uniform"
    seed: int = 0
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0

    name = "randlora"
    category = "reparametrisation"
    law = "x (W + (alpha/r) sum_k Gamma_k A_k Lambda_k B_k)"
    reference = "Albert et al., ICLR 2025, Eq. 2"
    bibtex = r"""
        @inproceedings{albert2025randlora,
          author = {Albert, Paul and Zhang, Frederic Z. and Saratchandran, Hemanth and
            Rodriguez-Opazo, Cristian and van den Hengel, Anton and Abbasnejad, Ehsan},
          title = {{RandLoRA}: Full-rank Parameter-efficient Fine-tuning of Large Models},
          booktitle = {International Conference on Learning Representations},
          year = {2025},
        }
    """
    num_parameters_formula = "sum over sites of n (r + min(d_in, d_out))"

    def __post_init__(self) -> None:
        """Check rank, bases and dropout."""
        self._positive("rank")
        self._one_of("bases")
        check_dropout(self.name, self.dropout)

    def build(self, host: Host) -> None:
        """Add a path at every site, all with the same A and B."""
        sites = host.find(self.sites, self.layers)
        pair = self.pair([(site.in_features, site.out_features) for site in sites])
        host.add("shared", pair, like=host.weight(sites[0]))
        for site in sites:
            lay(host, site, RandomPairs(pair, self, site))

    def pair(self, widths: list[tuple[int, int]]) -> SharedBases:
        """A and B for sites of these widths."""
        wide, narrow = (max(column) for column in zip(*widths, strict=True))
        return SharedBases(self, max(wide, narrow), min(wide, narrow))

    def num_parameters(self, host: Host) -> int:
        """Σ n (r + min(d_in, d_out))."""
        sites = host.find(self.sites, self.layers)
        small = [min(site.in_features, site.out_features) for site in sites]
        return sum(self.num_pairs(width) * (self.rank + width) for width in small)

    def num_pairs(self, width: int) -> int:
        """⌈width/r⌉, n at a site whose narrow side this is."""
        return math.ceil(width / self.rank)


class SharedBases(nn.Module):
    """A (r, 1, min) and B (max, n, r), drawn from the seed.

    The uniform ones are drawn in bfloat16 and divided by their deviation there, as peft does on
    hardware that has the format.
    """

    A: Tensor
    B: Tensor

    def __init__(self, config: RandLoRA, wide: int, narrow: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        rank, count = config.rank, config.num_pairs(narrow)
        if config.bases == "uniform":
            down = _uniform((rank, 1, narrow), generator)
            up = torch.cat([_uniform((wide, 1, rank), generator) for _ in range(count)], dim=1)
        else:
            share = 1 / 3 if config.bases == "sparse" else 1 / math.sqrt(narrow)
            down = _signs((rank, 1, narrow), share, generator)
            up = _signs((wide, count, rank), share, generator)
        for name, matrix in (("A", down), ("B", up)):
            self.register_buffer(name, (matrix / matrix.std()).float(), persistent=False)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    matrix = torch.empty(shape, dtype=torch.bfloat16)
    return nn.init.kaiming_uniform_(matrix, a=math.sqrt(5), generator=generator)


def _signs(shape: tuple[int, ...], share: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(shape, generator=generator)
    return (drawn > 1 - share / 2).float() - (drawn < share / 2).float()


class RandomPairs(WeightPath):
    """ΔW = (α/r)·Σ_k B_k Λ_k A Γ_k or its transpose; Lambda (r, n), Gamma (n, min)."""

    def __init__(self, pair: SharedBases, config: RandLoRA, site: Site) -> None:
        super().__init__(site, config.dropout)
        wide, narrow = site.in_features, site.out_features
        self.small, self.large = min(wide, narrow), max(wide, narrow)
        count = config.num_pairs(self.small)
        self.Lambda = nn.Parameter(torch.zeros(config.rank, count))
        self.Gamma = nn.Parameter(torch.full((count, self.small), 1 / max(count, self.small)))
        self.scale = config.alpha / config.rank
        self.flipped = wide > narrow
        self.pair = (pair,)  # in a tuple: registered once, for all sites

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Two factors of ΔW/s, (out, r n) and (r n, in)."""
        (pair,) = self.pair
        count = self.Lambda.shape[1]
        down = pair.A[:, :, : self.small].to(self.Lambda.dtype)
        up = pair.B[: self.large, :count].to(self.Lambda.dtype).flatten(1)  # (large, n r)
        scaled = (self.Lambda[..., None] * down * self.Gamma).flatten(0, 1)  # (r n, small)
        return (scaled.T, up.T) if self.flipped else (up, scaled)

    def weight(self) -> Tensor:
        """The scaled product."""
        left, right = self._factors()
        return self.scale * left @ right

    def through(self, x: Tensor) -> Tensor:
        """ΔW x, by way of r n features."""
        left, right = self._factors()
        return linear(linear(x, right), left) * self.scale
