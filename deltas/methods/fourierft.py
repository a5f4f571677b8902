"""FourierFT: the change of weight has a sparse spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import WeightPath, lay
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.methods.parts.on_weight import at_least_single
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class FourierFT(Delta):
    """W + α·Re(IDFT₂(F)), F (out, in) zero but for n trained entries (Gao et al., Eq. 2–4).

    The places of the entries are drawn without replacement from a seed, the same ones at all sites
    of one size. IDFT₂ divides by d_in d_out, which α makes up for. The entries start at zero, where
    training starts at the base model; the paper starts them Gaussian.

    Attributes:
        num_frequencies: n.
        scaling: α.
        seed: of the places.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
    """

    num_frequencies: int = 256
    scaling: float = 150.0
    seed: int = 777
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None

    name = "fourierft"
    default_rate = 1e-2
    category = "reparametrisation"
    law = "x (W + alpha Re(IDFT2(F))), F with n entries"
    reference = "Gao et al., ICML 2024, Eq. 2-4"
    bibtex = r"""
        @inproceedings{gao2024fourierft,
          author = {Gao, Ziqi and Wang, Qichao and Chen, Aochuan and Liu, Zijing and Wu, Bingzhe
            and Chen, Liang and Li, Jia},
          title = {Parameter-Efficient Fine-Tuning with Discrete {Fourier} Transform},
          booktitle = {International Conference on Machine Learning},
          year = {2024},
        }
    """
    num_parameters_formula = "sum over sites of n"

    def __post_init__(self) -> None:
        """Check the number of entries."""
        self._positive("num_frequencies")

    def build(self, host: Host) -> None:
        """Add a path at every site."""
        for site in self._checked_sites(host):
            lay(host, site, SpectralPath(self, site))

    def num_parameters(self, host: Host) -> int:
        """Σ n."""
        return self.num_frequencies * len(self._checked_sites(host))

    def _checked_sites(self, host: Host) -> list[Site]:
        found = host.find(self.sites, self.layers)
        for site in found:
            size = site.in_features * site.out_features
            if self.num_frequencies > size:
                raise InputError(
                    f"fourierft: num_frequencies={self.num_frequencies} is above the {size} "
                    f"entries of {site.path}; choose fewer."
                )
        return found


class SpectralPath(WeightPath):
    """ΔW = α·Re(IDFT₂(F)); c (n,) holds the entries of F at ``places``, counted by rows."""

    places: Tensor

    def __init__(self, config: FourierFT, site: Site) -> None:
        super().__init__(site)
        self.c = nn.Parameter(torch.zeros(config.num_frequencies))
        self.shape, self.scaling = (site.out_features, site.in_features), config.scaling
        generator = torch.Generator().manual_seed(config.seed)
        order = torch.randperm(self.shape[0] * self.shape[1], generator=generator)
        places = order[: config.num_frequencies].clone()
        self.register_buffer("places", places, persistent=False)

    def weight(self) -> Tensor:
        """The scaled real part of the inverse transform."""
        rows, columns = self.shape
        entries = at_least_single(self.c)
        spectrum = entries.new_zeros(rows * columns).scatter(0, self.places, entries)
        change = self.scaling * torch.fft.ifft2(spectrum.view(rows, columns)).real
        return change.to(self.c.dtype)
