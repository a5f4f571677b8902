"""MiSS: the change of weight repeats one block along the input; Bone also multiplies by W."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import check_dropout
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.methods.parts.on_weight import OnWeightPath, lay_on_weight
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class MiSS(Delta):
    """W + [D' D' ⋯ D'], D (r, out) repeated along the input (Kang, Yin, Eq. 5).

    The path adds up the input in steps of r and maps the r sums by D; where r does not divide the
    width of the input, the last repetition is cut. With "mini" D itself is a block (r, k) repeated
    along the output. With "bone" (their arXiv 2409.15371, "Bat") the weight is cut into square
    blocks W_ij (r, r), and ΔW_ij = W_ij D_i + D_i with D_i (r, r) for the block row i. D starts at
    zero, so training starts at the base model.

    Attributes:
        rank: r.
        variant: what is repeated.
        columns: k, of the variant "mini"; it divides the width of the output.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of the path while training; "bone" has none.
    """

    rank: int = 8
    variant: Literal["miss", "mini", "bone"] = "miss"
    columns: int = 1
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0

    name = "miss"
    category = "reparametrisation"
    law = "x (W + (D; D; ...; D))"
    reference = "Kang, Yin, arXiv 2409.15371 (Bone, MiSS)"
    bibtex = r"""
        @misc{kang2024miss,
          author = {Kang, Jiale and Yin, Qingyu},
          title = {{MiSS}: Revisiting the Trade-off in {LoRA} with an Efficient Shard-Sharing
            Structure},
          eprint = {2409.15371},
          archiveprefix = {arXiv},
          year = {2024},
        }
    """
    num_parameters_formula = "sum over sites of r d_out (miss, bone) or r k (mini)"

    def __post_init__(self) -> None:
        """Check rank, variant and dropout."""
        self._positive("rank", "columns")
        self._one_of("variant")
        check_dropout(self.name, self.dropout)
        if self.dropout and self.variant == "bone":
            raise InputError("miss: the variant bone has no dropout; set dropout=0.")

    def build(self, host: Host) -> None:
        """Add a path at every site."""
        for site in self._checked_sites(host):
            lay_on_weight(host, site, ShardPath(self.shape(site), self, site))

    def num_parameters(self, host: Host) -> int:
        """Σ r d_out, or Σ r k."""
        return sum(torch.Size(self.shape(site)).numel() for site in self._checked_sites(host))

    def shape(self, site: Site) -> tuple[int, ...]:
        """Of D at a site."""
        if self.variant == "bone":
            return site.out_features // self.rank, self.rank, self.rank
        return self.rank, self.columns if self.variant == "mini" else site.out_features

    def _checked_sites(self, host: Host) -> list[Site]:
        found = host.find(self.sites, self.layers)
        for site in found:
            wide, narrow = site.in_features, site.out_features
            if self.rank > wide:
                problem = f"rank {self.rank} is above the width {wide} of its input"
            elif self.variant == "mini" and narrow % self.columns:
                problem = f"columns={self.columns} does not divide the width {narrow} of its output"
            elif self.variant == "bone" and (wide % self.rank or narrow % self.rank):
                problem = f"rank {self.rank} does not divide both widths {wide} and {narrow}"
            else:
                continue
            raise InputError(f"miss: {site.path} does not fit: {problem}; choose another one.")
        return found


class ShardPath(OnWeightPath):
    """ΔW of D; shapes: (r, out), (r, k), or (out/r, r, r) for Bone."""

    def __init__(self, shape: tuple[int, ...], config: MiSS, site: Site) -> None:
        super().__init__(site, config.dropout)
        self.D = nn.Parameter(torch.zeros(shape))
        self.rank, self.narrow = config.rank, site.out_features

    def _rows(self) -> Tensor:
        """D (r, out)."""
        return self.D.repeat(1, self.narrow // self.D.shape[1])

    def change_of(self, base: Tensor) -> Tensor:
        """ΔW (out, in)."""
        wide = base.shape[1]
        if self.D.dim() == 2:
            return self._rows().T.repeat(1, -(-wide // self.rank))[:, :wide]
        blocks = base.unflatten(1, (-1, self.rank)).unflatten(0, (-1, self.rank))  # i, r, j, r
        change = blocks.transpose(1, 2) @ self.D[:, None] + self.D[:, None]
        return change.transpose(1, 2).flatten(2).flatten(0, 1)

    def through(self, x: Tensor) -> Tensor:
        """ΔW x, by way of r sums."""
        if self.D.dim() == 3:
            return linear(x, self.weight())
        full = pad(x, (0, -x.shape[-1] % self.rank))
        return full.unflatten(-1, (-1, self.rank)).sum(-2) @ self._rows()
