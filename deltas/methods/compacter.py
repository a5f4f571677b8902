"""Compacter: adapters of hypercomplex maps that share their rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.deltas.methods.parts.adapters import check_activation, output_sites
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class Compacter(Delta):
    """h + φ(W_d h + b_d) W_u + b_u with W = Σ_i A_i ⊗ (s_i t_i) (Karimi Mahabadi et al.).

    A_i ∈ R^{n×n} for i = 1 … n is one rule for all adapters of the model; s_i and t_i are thin and
    belong to one matrix each. With ``sites=("mlp.down",)`` it is Compacter++. The t_i of W_u and
    the biases start at zero, so that the start is the identity exactly.

    Attributes:
        bottleneck: m, the inner width; a multiple of n.
        num_terms: n, how many Kronecker products make a matrix.
        rank: r of every s_i t_i.
        activation: φ, by its name in transformers.
        sites: linear maps whose output is adapted.
        layers: blocks to act in; None means all.
    """

    bottleneck: int = 32
    num_terms: int = 4
    rank: int = 1
    activation: str = "gelu"
    sites: tuple[str, ...] = ("attention.output", "mlp.down")
    layers: tuple[int, ...] | None = None

    name = "compacter"
    category = "addition"
    law = "h + phi(h W_d) W_u, W = sum_i A_i (x) (s_i t_i)"
    reference = "Karimi Mahabadi, Henderson, Ruder, NeurIPS 2021, Section 3"
    bibtex = r"""
        @inproceedings{karimimahabadi2021compacter,
          author = {Karimi Mahabadi, Rabeeh and Henderson, James and Ruder, Sebastian},
          title = {{Compacter}: Efficient Low-Rank Hypercomplex Adapter Layers},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2021},
        }
    """
    num_parameters_formula = "n^3 + sum over sites of 2 r (d + m) + d + m"
    unmergeable = "its bottleneck is not linear in the state"

    def __post_init__(self) -> None:
        """Check the sizes and the activation."""
        self._positive("bottleneck", "num_terms", "rank")
        check_activation(self.name, self.activation)
        if self.bottleneck % self.num_terms:
            raise InputError(
                f"compacter: bottleneck {self.bottleneck} is no multiple of num_terms "
                f"{self.num_terms}; choose one, such as {self.num_terms}."
            )
        if self.rank > self.bottleneck // self.num_terms:
            raise InputError(
                f"compacter: rank {self.rank} is above bottleneck / num_terms = "
                f"{self.bottleneck // self.num_terms}; choose 1 to that."
            )

    def build(self, host: Host) -> None:
        """Lay the rule, and an adapter at every site."""
        sites, n, r = self._checked_sites(host), self.num_terms, self.rank
        rule = Rule(host.normal(n, n, n, std=1 / math.sqrt(n)))
        host.add(sites[0].path, rule, like=host.weight(sites[0]), key="rule")
        host.shared.append(f"{host.namespace}.rule.A")
        for site in sites:
            rows, columns = site.out_features // n, self.bottleneck // n
            adapter = HypercomplexBottleneck(
                rule,
                host.normal(n, columns, r, std=1.0),
                host.normal(n, r, rows, std=1 / math.sqrt(r * site.out_features)),
                host.normal(n, rows, r, std=1.0),
                self.activation,
            )
            host.add(site.path, adapter, like=host.weight(site))
            host.on_output(site.module, adapter)

    def num_parameters(self, host: Host) -> int:
        """n³ + Σ 2 r (d + m) + d + m."""
        m = self.bottleneck
        widths = [site.out_features for site in self._checked_sites(host)]
        return self.num_terms**3 + sum((2 * self.rank + 1) * (d + m) for d in widths)

    def _checked_sites(self, host: Host) -> list[Site]:
        sites = output_sites(self.name, host, self.sites, self.layers, self.bottleneck)
        for site in sites:
            if site.out_features % self.num_terms:
                raise InputError(
                    f"compacter: the width {site.out_features} of {site.path} is no multiple of "
                    f"num_terms {self.num_terms}; choose a divisor of it."
                )
        return sites


class Rule(nn.Module):
    """A (n, n, n): A_i = A[i], shared by all adapters."""

    def __init__(self, matrices: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(matrices)


def hypercomplex(x: Tensor, A: Tensor, s: Tensor, t: Tensor) -> Tensor:  # noqa: N803
    """W x with W = Σ_i A_i ⊗ (s_i t_i), without forming W.

    Args:
        x: (…, n c).
        A: (n, n, n).
        s: (n, k, r).
        t: (n, r, c).

    Returns:
        (…, n k).
    """
    parts = x.unflatten(-1, (A.shape[0], -1))
    thin = torch.einsum("...qc,irc->...iqr", parts, t)
    mixed = torch.einsum("ipq,...iqr->...ipr", A, thin)
    return torch.einsum("...ipr,ikr->...pk", mixed, s).flatten(-2)


class HypercomplexBottleneck(nn.Module):
    """h ↦ h + φ(W_d h + b_d) W_u + b_u with the rule of another module.

    Shapes: down_s (n, m/n, r), down_t (n, r, d/n), up_s (n, d/n, r), up_t (n, r, m/n).
    """

    def __init__(
        self, rule: Rule, down_s: Tensor, down_t: Tensor, up_s: Tensor, activation: str
    ) -> None:
        super().__init__()
        self.__dict__["rule"] = rule  # one module for all adapters, so no submodule of each
        n, columns, rank = down_s.shape
        self.down_s = nn.Parameter(down_s)
        self.down_t = nn.Parameter(down_t)
        self.down_bias = nn.Parameter(torch.zeros(n * columns))
        self.up_s = nn.Parameter(up_s)
        self.up_t = nn.Parameter(torch.zeros(n, rank, columns))
        self.up_bias = nn.Parameter(torch.zeros(n * up_s.shape[1]))
        self.activation = ACT2FN[activation]

    def forward(self, _inputs: tuple, state: Tensor) -> Tensor:
        """The adapted state."""
        rule: Tensor = self.__dict__["rule"].A
        inner = hypercomplex(state, rule, self.down_s, self.down_t) + self.down_bias
        inner = self.activation(inner)
        return state + hypercomplex(inner, rule, self.up_s, self.up_t) + self.up_bias
