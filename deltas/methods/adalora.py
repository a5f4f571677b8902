"""AdaLoRA: a path in SVD form whose ranks are shared out among the sites while it trains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.paths import WeightPath, check_dropout, lay, low_rank_sites
from deltacontrol.deltas.editing.sites import Site
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class AdaLoRA(Delta):
    """W + (α/r)·P Λ Q, one budget of singular values for all sites (Zhang et al., Eq. 3).

    Λ starts at zero, P and Q Gaussian with columns and rows of unit length on average, near the
    orthogonality that the penalty γ Σ ‖P'P - I‖² + ‖Q Q' - I‖² (Eq. 4) asks for. A triplet (column
    of P, entry of Λ, row of Q) is as important as Eq. 7–11 say: from the sensitivity |w·∇w|,
    smoothed, times its uncertainty. Of T steps the first t_i train everything; then the budget
    falls from rank·n to target_rank·n for n sites along a cubic (Eq. 12), and every ``interval``
    steps the least important entries of Λ are set to zero, from where they may come back; at step
    T - t_f the allocation is final and the remaining steps train what is left. w is read right
    after its update, ∇w before it.

    A checkpoint holds the smoothed importances, so that a training can be continued: three numbers
    for each that is trained.

    Attributes:
        rank: r, at the start, of each site.
        target_rank: the average rank of a site at the end.
        alpha: α; the path is scaled by α/r, also after ranks have gone.
        sites: linear maps that get a path.
        layers: blocks to act in; None means all.
        dropout: probability of dropping an input of the path while training.
        warmup: t_i/T.
        final: t_f/T.
        interval: steps between two allocations.
        sensitivity_decay: β₁ of Eq. 9.
        uncertainty_decay: β₂ of Eq. 10.
        orthogonality: γ.
    """

    rank: int = 12
    target_rank: int = 8
    alpha: float = 16.0
    sites: tuple[str, ...] = (
        "attention.query",
        "attention.key",
        "attention.value",
        "attention.output",
        "mlp.up",
        "mlp.down",
    )
    layers: tuple[int, ...] | None = None
    dropout: float = 0.0
    warmup: float = 0.1
    final: float = 0.3
    interval: int = 10
    sensitivity_decay: float = 0.85
    uncertainty_decay: float = 0.85
    orthogonality: float = 0.1

    name = "adalora"
    searched_rates = (1e-3, 3e-3, 1e-2, 3e-2)
    category = "reparametrisation"
    law = "x (W + (alpha/r) Q Λ P)"
    reference = "Zhang et al., ICLR 2023, Eq. 3-12"
    bibtex = r"""
        @inproceedings{zhang2023adalora,
          author = {Zhang, Qingru and Chen, Minshuo and Bukharin, Alexander and others},
          title = {Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning},
          booktitle = {International Conference on Learning Representations},
          year = {2023},
        }
    """
    num_parameters_formula = "sum over sites of r (d_in + d_out + 1)"

    def __post_init__(self) -> None:
        """Check ranks, schedule and decays."""
        self._positive("rank", "target_rank", "interval")
        check_dropout(self.name, self.dropout)
        if self.target_rank > self.rank:
            raise InputError(
                f"adalora: target_rank {self.target_rank} is above rank {self.rank}, the start."
            )
        if not (0 <= self.warmup and 0 <= self.final and self.warmup + self.final < 1):
            raise InputError(
                f"adalora: warmup {self.warmup} and final {self.final} are fractions of the steps; "
                "expected both at least 0 and their sum below 1."
            )
        for field in ("sensitivity_decay", "uncertainty_decay"):
            decay = getattr(self, field)
            if not 0 < decay < 1:
                raise InputError(f"adalora: {field} is {decay}; expected between 0 and 1.")
        if not self.orthogonality >= 0:
            raise InputError(
                f"adalora: orthogonality is {self.orthogonality}; expected at least 0."
            )

    def build(self, host: Host) -> None:
        """Add a path at every site, the penalty, and the allocation of ranks."""
        paths = []
        for site in self._checked_sites(host):
            left = host.normal(site.out_features, self.rank, std=site.out_features**-0.5)
            right = host.normal(self.rank, site.in_features, std=site.in_features**-0.5)
            path = SingularPath(left, right, self, site)
            lay(host, site, path)
            paths.append(path)
        if self.orthogonality:
            host.add_penalty(
                lambda: self.orthogonality * torch.stack([p.orthogonality() for p in paths]).sum()
            )
        host.on_step(RankAllocation(self, paths))

    def num_parameters(self, host: Host) -> int:
        """Σ r (d_in + d_out + 1)."""
        sites = self._checked_sites(host)
        return sum(self.rank * (site.in_features + site.out_features + 1) for site in sites)

    def _checked_sites(self, host: Host) -> list[Site]:
        return low_rank_sites(host, self.sites, self.layers)


class SingularPath(WeightPath):
    """ΔW = (α/r)·P diag(Λ ⊙ mask) Q; shapes: P (out, r), Λ (r,), Q (r, in), mask (r,).

    ``sensitivity_*`` and ``uncertainty_*`` are the smoothed importances of every entry.
    """

    mask: Tensor

    def __init__(self, left: Tensor, right: Tensor, config: AdaLoRA, site: Site) -> None:
        super().__init__(site, config.dropout)
        rank = len(right)
        self.P = nn.Parameter(left)
        self.Lambda = nn.Parameter(torch.zeros(rank))
        self.Q = nn.Parameter(right)
        self.scale = config.alpha / config.rank
        self.register_buffer("mask", torch.ones(rank, dtype=torch.bool))
        for name in ("P", "Lambda", "Q"):
            for kind in ("sensitivity", "uncertainty"):
                start = torch.zeros_like(self.get_parameter(name))
                self.register_buffer(f"{kind}_{name}", start)

    def weight(self) -> Tensor:
        """The scaled product of the three."""
        return self.scale * (self.P * (self.Lambda * self.mask)) @ self.Q

    def through(self, x: Tensor) -> Tensor:
        """ΔW x, by way of r features."""
        return linear(linear(x, self.Q) * (self.Lambda * self.mask * self.scale), self.P)

    def orthogonality(self) -> Tensor:
        """‖P'P - I‖² + ‖Q Q' - I‖² (Eq. 4)."""
        identity = torch.eye(len(self.Q), dtype=self.Q.dtype, device=self.Q.device)
        gaps = self.P.mT @ self.P - identity, self.Q @ self.Q.mT - identity
        return gaps[0].square().sum() + gaps[1].square().sum()

    @torch.no_grad()
    def observe(self, sensitivity_decay: float, uncertainty_decay: float) -> None:
        """Eq. 8–10, from the gradients that stand."""
        for name in ("P", "Lambda", "Q"):
            parameter = self.get_parameter(name)
            if parameter.grad is None:
                continue
            current = (parameter * parameter.grad).abs()
            smoothed = self.get_buffer(f"sensitivity_{name}")
            smoothed.lerp_(current, 1 - sensitivity_decay)
            spread = self.get_buffer(f"uncertainty_{name}")
            spread.lerp_((current - smoothed).abs(), 1 - uncertainty_decay)

    def importance(self) -> Tensor:
        """Eq. 7 and 11: one number a triplet, (r,)."""
        entries = {
            name: self.get_buffer(f"sensitivity_{name}") * self.get_buffer(f"uncertainty_{name}")
            for name in ("P", "Lambda", "Q")
        }
        return entries["Lambda"] + entries["P"].mean(0) + entries["Q"].mean(1)


class RankAllocation:
    """Keeps the most important triplets of all paths, as many as the budget of the step allows."""

    def __init__(self, config: AdaLoRA, paths: list[SingularPath]) -> None:
        self.config = config
        self.paths = paths
        self.start = config.rank * len(paths)
        self.target = config.target_rank * len(paths)

    def __call__(self, step: int, num_steps: int) -> None:
        """Observe, and allocate where it is time."""
        first = int(self.config.warmup * num_steps)
        last = max(num_steps - int(self.config.final * num_steps), 1)
        if step > last:
            return
        for path in self.paths:
            path.observe(self.config.sensitivity_decay, self.config.uncertainty_decay)
        if step == last:
            self._keep(self.target, lambda path, kept: path.mask.copy_(kept))
        elif step > first and step % self.config.interval == 0:
            budget = self.budget(step, first, last)
            self._keep(budget, lambda path, kept: path.Lambda.data.mul_(kept))

    def budget(self, step: int, first: int, last: int) -> int:
        """b(t) of Eq. 12 between t_i = ``first`` and T - t_f = ``last``."""
        left = 1 - (step - first) / (last - first)
        return self.target + int((self.start - self.target) * left**3)

    @torch.no_grad()
    def _keep(self, budget: int, act: Callable[[SingularPath, Tensor], object]) -> None:
        scores = torch.cat([path.importance() for path in self.paths])
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.topk(budget).indices] = True
        for path, part in zip(self.paths, kept.split(self.config.rank), strict=True):
            act(path, part)
