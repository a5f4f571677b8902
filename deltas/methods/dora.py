"""DoRA: the weight is split into magnitudes and directions; LoRA turns the directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from transformers.pytorch_utils import Conv1D

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import check_dropout, low_rank_sites
from deltacontrol.deltas.editing.sites import Site, add_change
from deltacontrol.deltas.quantised import values_of


@dataclass(frozen=True)
class DoRA(Delta):
    """W' = m ⊙ V/‖V‖ with V = W + (α/r)·B A: magnitude m and direction V (Liu et al., Eq. 5).

    ‖·‖ is the norm of the weights of one output feature, a column in the paper's orientation. A is
    uniform, B zero and m = ‖W‖, so training starts at the base model.

    Attributes:
        rank: r.
        alpha: α; B A is scaled by α/r.
        sites: linear maps to control.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of B A while training; the norms do not see it.
        constant_norm: no gradient flows through ‖V‖ (Liu et al., Eq. 11), which saves memory. The
            gradient is then not that of the loss in A and B, but its part along the direction.
    """

    rank: int = 8
    alpha: float = 16.0
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    constant_norm: bool = True

    name = "dora"
    default_rate = 1e-3
    category = "reparametrisation"
    law = "x m (W + (alpha/r) A B) / |W + (alpha/r) A B|"
    reference = "Liu et al., ICML 2024, Eq. 5"
    bibtex = r"""
        @inproceedings{liu2024dora,
          author = {Liu, Shih-Yang and Wang, Chien-Yi and Yin, Hongxu and Molchanov, Pavlo and
            Wang, Yu-Chiang Frank and Cheng, Kwang-Ting and Chen, Min-Hung},
          title = {{DoRA}: Weight-Decomposed Low-Rank Adaptation},
          booktitle = {International Conference on Machine Learning},
          year = {2024},
        }
    """
    num_parameters_formula = "sum over sites of r (d_in + d_out) + d_out"

    def __post_init__(self) -> None:
        """Check rank and dropout."""
        self._positive("rank")
        check_dropout(self.name, self.dropout)

    def build(self, host: Host) -> None:
        """Put magnitudes and a low-rank change of direction at every site."""
        for site in self._checked_sites(host):
            down = host.kaiming(self.rank, site.in_features)
            path = MagnitudeDirection(host.weight(site), down, self, site)
            host.add(site.path, path, like=host.weight(site), key=site.key)
            host.on_output(site.module, path)
            name = f"{site.path}.weight"
            host.on_merge(name, partial(path.merged, partial(host.controlled, name)))

    def num_parameters(self, host: Host) -> int:
        """Σ r (d_in + d_out) + d_out."""
        return sum(
            self.rank * (site.in_features + site.out_features) + site.out_features
            for site in self._checked_sites(host)
        )

    def _checked_sites(self, host: Host) -> list[Site]:
        return low_rank_sites(host, self.name, self.rank, self.sites, self.layers)


class MagnitudeDirection(nn.Module):
    """y ↦ b + g ⊙ (y - b + s·B A x) with the gain g = m/‖W + s·B A‖; b is the map's own bias.

    Shapes: A (rank, in), B (out, rank), m (out,). A control that acted at the site before is scaled
    with the rest; the norms are those of the base weight and this change alone.
    """

    def __init__(self, weight: Tensor, down: Tensor, config: DoRA, site: Site) -> None:
        super().__init__()
        self.A = nn.Parameter(down)
        self.B = nn.Parameter(torch.zeros(site.out_features, config.rank))
        self.site = site
        self.m = nn.Parameter(_norms(self.site.rows(weight.detach())))
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout
        self.constant_norm = config.constant_norm

    def forward(self, inputs: tuple, output: Tensor) -> Tensor:
        """The site's output under the new magnitudes and directions."""
        x = inputs[0]
        if self.dropout:
            x = dropout(x, self.dropout, self.training)
        module = self.site.module
        assert isinstance(module, nn.Linear | Conv1D)
        gain = self.m / self._norms(values_of(module, self.m.dtype))
        low = linear(linear(x, self.A) * self.scale, self.B)
        own = self.site.take(output)
        unbiased = own if module.bias is None else own - self.site.take(module.bias)
        # Exactly y where g = 1 and B = 0, which b + g (y - b) is not.
        change = low + (gain - 1) * (unbiased + low)
        return output + self.site.spread(change)

    def merged(self, parameter: Callable[[], Tensor], weight: Tensor) -> Tensor:
        """The weight g ⊙ (V + s·B A) in float64, V the weight with all that acted before.

        The norms are taken as in the forward pass, in the dtype of the controls: at the start g is
        one, exactly, and the weight stays what it is.

        Args:
            parameter: gives the base parameter, without what acts beside it.
            weight: V.
        """
        gain = self.m / self._norms(parameter().to(self.m.dtype))
        change = self.scale * self.B.double() @ self.A.double()
        rows = self.site.rows(weight)
        return add_change(
            self.site, lambda: gain[:, None] * (rows + change) - rows, weight
        ).detach()

    def _norms(self, weight: Tensor) -> Tensor:
        """‖W + s·B A‖ of each output feature, (out,)."""
        down, up = self.A, self.B
        if self.constant_norm:
            down, up = down.detach(), up.detach()
        return _norms(self.site.rows(weight) + self.scale * (up @ down))


def _norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1)
