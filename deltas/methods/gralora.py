"""GraLoRA: a low-rank change of its own for each block of the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import WeightPath, check_dropout, lay
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class GraLoRA(Delta):
    """W + s·ΔW, block (j, n) of k² blocks of ΔW is B_jn A_jn of rank r/k (Jung et al., Eq. 5–6).

    s = α/(r + r₀). With r₀ > 0 a low-rank change B₀ A₀ of the whole weight is added (their hybrid).
    The A are uniform and the B zero, so training starts at the base model.

    Attributes:
        rank: r, a multiple of k: of a row or a column of blocks together.
        alpha: α.
        num_blocks: k; it divides both widths.
        hybrid_rank: r₀.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of the path while training.
    """

    rank: int = 8
    alpha: float = 16.0
    num_blocks: int = 2
    hybrid_rank: int = 0
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0

    name = "gralora"
    category = "reparametrisation"
    law = "x (W + s [A_nj B_nj]), k^2 blocks of rank r/k"
    reference = "Jung et al., NeurIPS 2025, arXiv 2505.20355, Eq. 5-6"
    bibtex = r"""
        @misc{jung2025gralora,
          author = {Jung, Yeonjoon and Ahn, Daehyun and Kim, Hyungjun and Kim, Taesu and
            Park, Eunhyeok},
          title = {{GraLoRA}: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning},
          eprint = {2505.20355},
          archiveprefix = {arXiv},
          year = {2025},
        }
    """
    num_parameters_formula = "sum over sites of (r + r_0) (d_in + d_out)"

    def __post_init__(self) -> None:
        """Check ranks and dropout."""
        self._positive("rank", "num_blocks")
        check_dropout(self.name, self.dropout)
        if self.hybrid_rank < 0:
            raise InputError(f"gralora: hybrid_rank is {self.hybrid_rank}; expected 0 or more.")
        if self.rank % self.num_blocks:
            raise InputError(
                f"gralora: rank {self.rank} is no multiple of num_blocks={self.num_blocks}."
            )

    def build(self, host: Host) -> None:
        """Add a path at every site."""
        for site in self._checked_sites(host):
            count, wide = self.num_blocks, site.in_features // self.num_blocks
            down = torch.stack([host.kaiming(self.rank, wide).T for _ in range(count)])
            whole = host.kaiming(self.hybrid_rank, site.in_features) if self.hybrid_rank else None
            lay(host, site, BlockLowRank(down, whole, self, site))

    def num_parameters(self, host: Host) -> int:
        """Σ (r + r₀)(d_in + d_out)."""
        rank = self.rank + self.hybrid_rank
        return sum(rank * (s.in_features + s.out_features) for s in self._checked_sites(host))

    def _checked_sites(self, host: Host) -> list[Site]:
        found = host.find(self.sites, self.layers)
        for site in found:
            if site.in_features % self.num_blocks or site.out_features % self.num_blocks:
                raise InputError(
                    f"gralora: num_blocks={self.num_blocks} does not divide both widths of "
                    f"{site.path} ({site.in_features} -> {site.out_features}); choose another."
                )
        return found


class BlockLowRank(WeightPath):
    """ΔW = s·[B_jn A_jn]; A (k, in/k, r), B (k, r, out/k), and A_0 (r₀, in), B_0 (out, r₀).

    A[n] maps the input block n to r features, k runs of r/k; run j of them goes to output block j,
    where the run from n is the n-th among the rows of B[j].
    """

    def __init__(self, down: Tensor, whole: Tensor | None, config: GraLoRA, site: Site) -> None:
        super().__init__(site, config.dropout)
        count, narrow = config.num_blocks, site.out_features // config.num_blocks
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(torch.zeros(count, config.rank, narrow))
        if whole is not None:
            self.A_0 = nn.Parameter(whole)
            self.B_0 = nn.Parameter(torch.zeros(site.out_features, len(whole)))
        self.hybrid = whole is not None
        self.scale = config.alpha / (config.rank + config.hybrid_rank)

    def weight(self) -> Tensor:
        """The blocks at their places."""
        count = len(self.A)
        down = self.A.unflatten(2, (count, -1))  # n, i, j, rank
        up = self.B.unflatten(1, (count, -1))  # j, n, rank, o
        change = torch.einsum("nijr,jnro->joni", down, up).flatten(2).flatten(0, 1)
        if self.hybrid:
            change = change + self.B_0 @ self.A_0
        return self.scale * change
