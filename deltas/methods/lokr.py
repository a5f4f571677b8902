"""LoKr: the change of weight is a Kronecker product."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import WeightPath, check_dropout, lay
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class LoKr(Delta):
    """W + (α/r)·W₁ ⊗ W₂ with W₁ (a, b), W₂ (c, d), a c = out, b d = in (Yeh et al.).

    A factor is a matrix of its own, or a product of rank r where that is smaller: W₂ if
    r < max(c, d)/2, and W₁ by the same rule if ``decompose_both``. W₁ starts at zero and the rest
    uniform, so training starts at the base model.

    Attributes:
        rank: r of a decomposed factor.
        alpha: α; the product is scaled by α/r, whether or not a factor is decomposed.
        factor: upper bound of a and b; None makes them as near as possible to √out and √in.
        decompose_both: W₁ may be a product as well.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of the path while training.
    """

    rank: int = 8
    alpha: float = 16.0
    factor: int | None = None
    decompose_both: bool = False
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0

    name = "lokr"
    searched_rates = (1e-3, 3e-3, 1e-2, 3e-2)
    category = "reparametrisation"
    law = "x (W + (alpha/r) kron(W1, W2))"
    reference = "Yeh et al., ICLR 2024, arXiv 2309.14859; Edalati et al., arXiv 2212.10650"
    bibtex = r"""
        @inproceedings{yeh2024navigating,
          author = {Yeh, Shih-Ying and Hsieh, Yu-Guan and Gao, Zhidong and others},
          title = {Navigating Text-To-Image Customization: From {LyCORIS} Fine-Tuning to Model
            Evaluation},
          booktitle = {International Conference on Learning Representations},
          eprint = {2309.14859},
          archiveprefix = {arXiv},
          year = {2024},
        }
        @misc{edalati2022krona,
          author = {Edalati, Ali and Tahaei, Marzieh and Kobyzev, Ivan and others},
          title = {{KronA}: Parameter Efficient Tuning with {Kronecker} Adapter},
          eprint = {2212.10650},
          archiveprefix = {arXiv},
          year = {2022},
        }
    """
    num_parameters_formula = "sum over sites of (a b or r (a + b)) + (c d or r (c + d))"

    def __post_init__(self) -> None:
        """Check rank, factor and dropout."""
        self._positive("rank")
        check_dropout(self.name, self.dropout)
        if self.factor is not None and self.factor < 1:
            raise InputError(f"lokr: factor is {self.factor}; expected at least 1, or none.")

    def build(self, host: Host) -> None:
        """Add a path at every site."""
        for site in host.find(self.sites, self.layers):
            shapes = self.factor_shapes(site)
            first, second = ([host.kaiming(*s) for s in factor] for factor in shapes)
            first[0] = torch.zeros(shapes[0][0])
            lay(host, site, KroneckerPath(first, second, self, site))

    def num_parameters(self, host: Host) -> int:
        """Σ (a b or r (a + b)) + (c d or r (c + d))."""
        total = 0
        for site in host.find(self.sites, self.layers):
            first, second = self._shapes(site)
            for shape, allowed in ((first, self.decompose_both), (second, True)):
                product = self._is_product(shape, allowed)
                total += self.rank * sum(shape) if product else math.prod(shape)
        return total

    def _shapes(self, site: Site) -> tuple[tuple[int, int], tuple[int, int]]:
        """(a, b) and (c, d)."""
        a, b = (_divisor(n, self.factor) for n in (site.out_features, site.in_features))
        return (a, b), (site.out_features // a, site.in_features // b)

    def _is_product(self, shape: tuple[int, int], allowed: bool) -> bool:
        return allowed and self.rank < max(shape) / 2

    def factor_shapes(self, site: Site) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Shapes of the matrices of W₁ and of W₂: one each, or the two whose product it is."""
        first, second = self._shapes(site)
        return self._cut(first, self.decompose_both), self._cut(second, True)

    def _cut(self, shape: tuple[int, int], allowed: bool) -> list[tuple[int, int]]:
        rows, columns = shape
        product = self._is_product(shape, allowed)
        return [(rows, self.rank), (self.rank, columns)] if product else [shape]


def _divisor(number: int, bound: int | None) -> int:
    """The largest divisor of ``number`` up to ``bound``; up to its root where that is smaller.

    A bound that divides the number is taken as it is, also above the root.
    """
    if bound is not None and number % bound == 0:
        return bound
    limit = min(math.isqrt(number), bound or number)
    return next(n for n in range(limit, 0, -1) if number % n == 0)


class KroneckerPath(WeightPath):
    """ΔW = (α/r)·W₁ ⊗ W₂, each factor one matrix or the product of two."""

    def __init__(self, first: list[Tensor], second: list[Tensor], config: LoKr, site: Site) -> None:
        super().__init__(site, config.dropout)
        self.W_1 = nn.ParameterList(first)
        self.W_2 = nn.ParameterList(second)
        self.scale = config.alpha / config.rank

    def _factors(self) -> tuple[Tensor, Tensor]:
        first, second = ([*factor] for factor in (self.W_1, self.W_2))
        return (
            first[0] @ first[1] if len(first) == 2 else first[0],
            second[0] @ second[1] if len(second) == 2 else second[0],
        )

    def weight(self) -> Tensor:
        """The scaled Kronecker product."""
        return self.scale * torch.kron(*self._factors())

    def through(self, x: Tensor) -> Tensor:
        """ΔW x: with x as a matrix X (b, d), the matrix W₁ X W₂' (a, c)."""
        first, second = self._factors()
        folded = x.unflatten(-1, (first.shape[1], second.shape[1]))
        inner = linear(folded, second)  # (..., b, c)
        return self.scale * (first @ inner).flatten(-2)
