"""DoRA: the weight is split into magnitudes and directions; LoRA turns the directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, embedding, linear
from transformers.pytorch_utils import Conv1D

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import check_dropout, low_rank_sites, widths
from deltacontrol.deltas.editing.sites import Site, add_change
from deltacontrol.deltas.methods.parts.tables import check_table
from deltacontrol.deltas.quantised import values_of


@dataclass(frozen=True)
class DoRA(Delta):
    """W' = m ⊙ V/‖V‖ with V = W + (α/r)·B A: magnitude m and direction V (Liu et al., Eq. 5).

    ‖·‖ is the norm of the weights of one output feature, a column in the paper's orientation. A is
    uniform, B zero and m = ‖W‖, so training starts at the base model. An embedding is the linear
    map of one-hot tokens, its norms those of a feature over the vocabulary; there A starts at zero
    and B Gaussian, and no input is dropped.

    Attributes:
        rank: r.
        alpha: α; B A is scaled by α/r.
        sites: linear maps and embeddings to control.
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
            if isinstance(site.module, nn.Embedding):
                self._lay_embedding(host, site, site.module)
                continue
            down = host.kaiming(self.rank, site.in_features)
            path = MagnitudeDirection(host.weight(site), down, self, site)
            host.add(site.path, path, like=host.weight(site), key=site.key)
            host.on_output(site.module, path)
            name = f"{site.path}.weight"
            host.on_merge(name, partial(path.merged, partial(host.controlled, name)))

    def num_parameters(self, host: Host) -> int:
        """Σ r (d_in + d_out) + d_out."""
        found = [widths(site) for site in self._checked_sites(host)]
        return sum(self.rank * (wide + narrow) + narrow for wide, narrow in found)

    def _checked_sites(self, host: Host) -> list[Site]:
        found = low_rank_sites(host, self.sites, self.layers, embeddings=True)
        for site in found:
            check_table(self.name, host, site)
        return found

    def _lay_embedding(self, host: Host, site: Site, module: nn.Embedding) -> None:
        up = host.normal(module.embedding_dim, self.rank, std=1.0)
        path = TableDirection(up, self.alpha / self.rank, module)
        path.constant_norm = self.constant_norm
        host.add(site.path, path, like=host.weight(site))
        host.on_output(module, path)
        name = f"{site.path}.weight"
        host.on_merge(name, partial(path.merged, partial(host.controlled, name)))


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


class TableDirection(nn.Module):
    """E(i) ↦ g ⊙ (E(i) + s·B A e_i) with g = m/‖E' + s·B A‖, the norms over the vocabulary.

    Shapes: A (rank, vocabulary), B (width, rank), m (width,). An embedding that scales its output
    (Gemma's) scales the change with it.
    """

    constant_norm = True

    def __init__(self, up: Tensor, scale: float, module: nn.Embedding) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.zeros(up.shape[1], module.num_embeddings))
        self.B = nn.Parameter(up)
        self.m = nn.Parameter(_norms(module.weight.detach().T))
        self.scale = scale
        self.__dict__["module"] = module  # the base's own: no submodule

    def _gain(self, table: Tensor) -> Tensor:
        """G (width,), for the table (vocabulary, width)."""
        down, up = self.A, self.B
        if self.constant_norm:
            down, up = down.detach(), up.detach()
        return self.m / _norms(table.T + self.scale * (up @ down))

    def forward(self, inputs: tuple, output: Tensor) -> Tensor:
        """The embedded tokens under the new magnitudes and directions."""
        module = self.__dict__["module"]
        low = linear(embedding(inputs[0], self.A.T), self.B) * self.scale
        scale = getattr(module, "embed_scale", None)
        low = low if scale is None else low * scale
        return output + low + (self._gain(module.weight) - 1) * (output + low)

    def merged(self, parameter: Callable[[], Tensor], weight: Tensor) -> Tensor:
        """The table (vocabulary, width) in float64; the norms as in the forward pass."""
        gain = self._gain(parameter().to(self.m.dtype)).double()
        change = self.scale * self.B.double() @ self.A.double()
        return (weight + change.T + (gain - 1) * (weight + change.T)).detach()


def _norms(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=1)
