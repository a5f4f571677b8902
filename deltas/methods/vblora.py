"""VB-LoRA: low-rank factors whose pieces are mixed from one bank of vectors for all sites."""

from __future__ import annotations

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
class VBLoRA(Delta):
    """W + B A, each run of b entries of B and A a mixture of K bank vectors (Li et al., Eq. 5).

    A run is Σ softmax(its K largest logits)·(their vectors), out of a bank (h, b) that all sites
    share. The bank is uniform in ±``bound`` and the logits Gaussian: as in the paper, training
    starts near the base model and not at it.

    Attributes:
        rank: r.
        num_vectors: h.
        vector_length: b; it divides all widths.
        top_k: K.
        bound: of the bank's start.
        logit_std: deviation of the logits' start.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of the path while training.
    """

    rank: int = 4
    num_vectors: int = 64
    vector_length: int = 16
    top_k: int = 2
    bound: float = 0.02
    logit_std: float = 0.1
    sites: tuple[str, ...] = ("attention.query", "attention.value")
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0

    name = "vblora"
    category = "reparametrisation"
    law = "x (W + A B), pieces sum of softmax(top K logits) bank"
    reference = "Li, Han, Ji, NeurIPS 2024, Eq. 5"
    bibtex = r"""
        @inproceedings{li2024vblora,
          author = {Li, Yang and Han, Shaobo and Ji, Shihao},
          title = {{VB-LoRA}: Extreme Parameter Efficient Fine-Tuning with Vector Banks},
          booktitle = {Advances in Neural Information Processing Systems},
          year = {2024},
        }
    """
    num_parameters_formula = "h b + sum over sites of h r (d_in + d_out) / b"
    identity_at_start = False

    def __post_init__(self) -> None:
        """Check the sizes."""
        self._positive("rank", "num_vectors", "vector_length", "top_k")
        check_dropout(self.name, self.dropout)
        if self.top_k > self.num_vectors:
            raise InputError(
                f"vblora: top_k={self.top_k} of num_vectors={self.num_vectors}; choose fewer."
            )

    def build(self, host: Host) -> None:
        """Add a path at every site, all with the same bank."""
        sites = self._checked_sites(host)
        start = torch.rand(self.num_vectors, self.vector_length, generator=host.generator)
        bank = Bank((2 * start - 1) * self.bound)
        host.add("shared", bank, like=host.weight(sites[0]))
        for site in sites:
            lay(host, site, BankPath(bank, host, self, site))

    def num_parameters(self, host: Host) -> int:
        """H b + Σ h r (d_in + d_out)/b."""
        widths = sum(s.in_features + s.out_features for s in self._checked_sites(host))
        own = self.num_vectors * self.rank * widths // self.vector_length
        return self.num_vectors * self.vector_length + own

    def _checked_sites(self, host: Host) -> list[Site]:
        found = host.find(self.sites, self.layers)
        for site in found:
            if site.in_features % self.vector_length or site.out_features % self.vector_length:
                raise InputError(
                    f"vblora: vector_length={self.vector_length} does not divide both widths of "
                    f"{site.path} ({site.in_features} -> {site.out_features}); choose a divisor."
                )
        return found


class Bank(nn.Module):
    """The vectors (h, b)."""

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors)


class BankPath(WeightPath):
    """ΔW = B A; logits A (r, in/b, h) and B (out/b, r, h)."""

    def __init__(self, bank: Bank, host: Host, config: VBLoRA, site: Site) -> None:
        super().__init__(site, config.dropout)
        length, count, std = config.vector_length, config.num_vectors, config.logit_std
        wide, narrow = site.in_features // length, site.out_features // length
        self.A = nn.Parameter(host.normal(config.rank, wide, count, std=std))
        self.B = nn.Parameter(host.normal(narrow, config.rank, count, std=std))
        self.top_k = config.top_k
        self.bank = (bank,)  # in a tuple: registered once, for all sites

    def _mixed(self, logits: Tensor) -> Tensor:
        """(…, b) of logits (…, h)."""
        (bank,) = self.bank
        best, places = logits.topk(self.top_k, dim=-1)
        vectors = bank.vectors.to(logits.dtype)
        return (best.softmax(-1)[..., None] * vectors[places]).sum(-2)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r)."""
        up = self._mixed(self.B).transpose(1, 2).flatten(0, 1)
        return self._mixed(self.A).flatten(1), up

    def weight(self) -> Tensor:
        """B A."""
        down, up = self._factors()
        return up @ down

    def through(self, x: Tensor) -> Tensor:
        """ΔW x, by way of r features."""
        down, up = self._factors()
        return linear(linear(x, down), up)
