"""Random mask: a random set of parameters is trained, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.methods.parts.masks import (
    SparseChange,
    check_density,
    maskable,
    num_kept,
    random_places,
)


@dataclass(frozen=True)
class RandomMask(Delta):
    """θ₀ + δ with δ zero except at k = density·D places, drawn once, all sets equally likely.

    What a chosen mask must beat (Sung et al.), and surprisingly hard to beat with a learning rate
    of its own (Xu & Zhang). The places follow from a seed, which is saved in their stead.

    Attributes:
        density: k/D.
        sites: modules to choose from; None means the backbone.
        layers: blocks to choose from; None means all.
        mask_seed: seed of the places; None takes it from the seed of ``attach``.
    """

    density: float = 0.005
    sites: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    mask_seed: int | None = None

    name = "random-mask"
    acts_on = "all parameters"
    default_rate = 5e-3
    searched_rates = (3e-3, 1e-2, 3e-2, 1e-1)
    category = "specification"
    law = "theta_0 + delta, delta_i = 0 outside a random set"
    reference = "Xu & Zhang, ICML 2024, Section 3; Sung, Nair, Raffel, NeurIPS 2021, Section 4"
    bibtex = r"""
        @inproceedings{xu2024random,
          author = {Xu, Jing and Zhang, Jingzhao},
          title = {Random Masking Finds Winning Tickets for Parameter Efficient Fine-tuning},
          booktitle = {International Conference on Machine Learning},
          year = {2024},
        }
        @inproceedings{sung2021training,
          author = {Sung, Yi-Lin and Nair, Varun and Raffel, Colin},
          title = {Training Neural Networks with Fixed Sparse Masks},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2021},
        }
    """
    num_parameters_formula = "k = density D"

    def __post_init__(self) -> None:
        """Check the density."""
        check_density(self.name, self.density)

    def build(self, host: Host) -> None:
        """Let the parameters be a function of the k values."""
        parameters = maskable(host, self.sites, self.layers)
        size, count = sum(p.numel() for p in parameters.values()), self.num_parameters(host)
        seed = host.draw_seed() if self.mask_seed is None else self.mask_seed
        change = SparseChange(parameters, count, random_places(size, count, seed), seed)
        host.add("change", change, like=next(iter(parameters.values())))
        host.shared.append(f"{host.namespace}.change.values")
        host.reparametrise(list(parameters), change)

    def num_parameters(self, host: Host) -> int:
        """K."""
        parameters = maskable(host, self.sites, self.layers)
        return num_kept(self.density, sum(p.numel() for p in parameters.values()))
