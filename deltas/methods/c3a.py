"""C3A: the change of weight is made of circulant blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import WeightPath, lay
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class C3A(Delta):
    """W + ΔW, ΔW of (d_out/b)(d_in/b) blocks that are circulant, divided by d_in (Chen et al.).

    The block of a kernel w (b,) has the entry w[(j - i) mod b] in row i and column j, so that it
    convolves its b features circularly (their Eq. 4–6). Its rank may be full, for b numbers instead
    of b². The kernels start at zero, where training starts at the base model.

    Attributes:
        block_size: b; it divides the widths of input and output.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
    """

    block_size: int = 16
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None

    name = "c3a"
    default_rate = 3e-2
    category = "reparametrisation"
    law = "x (W + C / d_in), C of circulant blocks"
    reference = "Chen et al., ACL 2025, arXiv 2407.19342, Eq. 4-6"
    bibtex = r"""
        @misc{chen2024c3a,
          author = {Chen, Aochuan and Cheng, Jiashun and Liu, Zijing and Gao, Ziqi and
            Tsung, Fugee and Li, Yu and Li, Jia},
          title = {Parameter-Efficient Fine-Tuning via Circular Convolution},
          eprint = {2407.19342},
          archiveprefix = {arXiv},
          year = {2024},
        }
    """
    num_parameters_formula = "sum over sites of d_in d_out / b"

    def __post_init__(self) -> None:
        """Check the size."""
        self._positive("block_size")

    def build(self, host: Host) -> None:
        """Add a path at every site."""
        for site in self._checked_sites(host):
            lay(host, site, CirculantPath(self.block_size, site))

    def num_parameters(self, host: Host) -> int:
        """Σ d_in d_out / b."""
        found = self._checked_sites(host)
        return sum(site.in_features * site.out_features // self.block_size for site in found)

    def _checked_sites(self, host: Host) -> list[Site]:
        found = host.find(self.sites, self.layers)
        for site in found:
            if site.in_features % self.block_size or site.out_features % self.block_size:
                raise InputError(
                    f"c3a: block_size={self.block_size} does not divide both widths of {site.path} "
                    f"({site.in_features} -> {site.out_features}); choose a common divisor."
                )
        return found


class CirculantPath(WeightPath):
    """ΔW = C/d_in; w (out/b, in/b, b) holds the first rows of the blocks of C."""

    places: Tensor

    def __init__(self, size: int, site: Site) -> None:
        super().__init__(site)
        rows, columns = site.out_features // size, site.in_features // size
        self.w = nn.Parameter(torch.zeros(rows, columns, size))
        self.width = site.in_features
        steps = torch.arange(size)
        self.register_buffer("places", (steps - steps[:, None]) % size, persistent=False)

    def weight(self) -> Tensor:
        """The blocks side by side."""
        blocks = self.w[..., self.places]  # (out/b, in/b, i, j)
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1) / self.width
