"""Diff pruning: a sparse difference to the base parameters, learnt with an L0 penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.methods.parts.masks import check_density, largest, maskable, num_kept
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class DiffPruning(Delta):
    """θ₀ + z ⊙ w with gates z in [0, 1] of the hard-concrete distribution (Guo et al., Section 3).

    With a stretched interval (l, r) around [0, 1] and u uniform,

        s = σ(log u - log(1 - u) + α),   z = min(1, max(0, s (r - l) + l)),
        E‖z‖₀ = Σ_i σ(α_i - log(-l/r)),

    and λ E‖z‖₀ is added to the training loss. In evaluation u = 1/2. Structured, a gate of each
    weight matrix or bias multiplies the gates of its entries (Section 3.3), in z and in the
    probability that a difference is not zero. After ``prune_at`` of the steps the differences z ⊙ w
    are cut to the k = density·D largest (Section 3.2), gates and penalty end, and the optimiser
    starts afresh on what is left.

    2 D numbers are trained until then, and keep their room afterwards.

    Attributes:
        density: k/D.
        structured: whether every matrix and bias has a gate of its own.
        penalty: λ.
        log_alpha: start of α; high, so that the gates are open.
        low: l.
        high: r.
        gate_step_ratio: learning rate of α over that of w.
        prune_at: when the differences are pruned, as a fraction of the steps.
        sites: modules to choose from; None means the backbone.
        layers: blocks to choose from; None means all.
    """

    density: float = 0.005
    structured: bool = True
    penalty: float = 1.25e-7
    log_alpha: float = 5.0
    low: float = -1.5
    high: float = 1.5
    gate_step_ratio: float = 100.0
    prune_at: float = 0.7
    sites: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    name = "diff-pruning"
    acts_on = "all parameters"
    default_rate = 1e-4
    category = "specification"
    law = "theta_0 + z w, z hard-concrete gates"
    reference = "Guo, Rush, Kim, ACL 2021, Section 3; Louizos et al., ICLR 2018, Eq. 10-12"
    bibtex = r"""
        @inproceedings{guo2021diff,
          author = {Guo, Demi and Rush, Alexander M. and Kim, Yoon},
          title = {Parameter-Efficient Transfer Learning with Diff Pruning},
          booktitle = {Annual Meeting of the Association for Computational Linguistics},
          year = {2021},
        }
        @inproceedings{louizos2018learning,
          author = {Louizos, Christos and Welling, Max and Kingma, Diederik P.},
          title = {Learning Sparse Neural Networks through {$L_0$} Regularization},
          booktitle = {International Conference on Learning Representations},
          year = {2018},
        }
    """
    num_parameters_formula = "2 D, and one a tensor if structured, of which density D remain"

    def __post_init__(self) -> None:
        """Check density, interval and schedule."""
        check_density(self.name, self.density)
        if not (self.low < 0 and self.high > 1):
            raise InputError(
                f"diff-pruning: the interval ({self.low}, {self.high}) must contain [0, 1] in its "
                "inside: low < 0 and high > 1."
            )
        if not 0 < self.prune_at <= 1:
            raise InputError(
                f"diff-pruning: prune_at is {self.prune_at}; expected a fraction of the steps, "
                "above 0 and up to 1."
            )
        if not self.penalty >= 0 or not self.gate_step_ratio > 0:
            raise InputError(
                f"diff-pruning: penalty is {self.penalty} and gate_step_ratio "
                f"{self.gate_step_ratio}; expected at least 0, and above 0."
            )

    def build(self, host: Host) -> None:
        """Let the parameters be θ₀ + z ⊙ w, with the penalty on z, and prune when it is time."""
        parameters = maskable(host, self.sites, self.layers)
        changes = {}
        for name, theta in parameters.items():
            change = changes[name] = GatedChange(theta, self)
            host.add(name.rpartition(".")[0], change, like=theta, key=name)
            for leaf, _ in change.named_parameters():
                host.shared.append(f"{host.namespace}.{name}.{leaf}")
                if leaf != "w" and self.gate_step_ratio != 1:
                    host.scale_rate(change, leaf, self.gate_step_ratio)

        def values() -> dict[str, Tensor]:
            return {name: changes[name](theta) for name, theta in parameters.items()}

        host.reparametrise(list(parameters), values)
        if self.penalty:
            host.add_penalty(
                lambda: (
                    self.penalty
                    * torch.stack([change.expected_count() for change in changes.values()]).sum()
                )
            )
        host.on_step(MagnitudePruning(self, list(changes.values())))

    def num_parameters(self, host: Host) -> int:
        """2 D, and one for each tensor if structured."""
        parameters = maskable(host, self.sites, self.layers)
        gates = len(parameters) if self.structured else 0
        return 2 * sum(p.numel() for p in parameters.values()) + gates


class GatedChange(nn.Module):
    """θ ↦ θ + z ⊙ w, and after pruning θ + mask ⊙ w; shapes of θ, the gate of the group (1,)."""

    mask: Tensor
    pruned: Tensor
    group_log_alpha: nn.Parameter | None

    def __init__(self, theta: Tensor, config: DiffPruning) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros_like(theta))
        self.log_alpha = nn.Parameter(torch.full_like(theta, config.log_alpha))
        group = nn.Parameter(theta.new_full((1,), config.log_alpha)) if config.structured else None
        self.register_parameter("group_log_alpha", group)
        self.register_buffer("mask", torch.ones_like(theta, dtype=torch.bool))
        self.register_buffer("pruned", torch.zeros((), dtype=torch.bool))
        self.low, self.high = config.low, config.high

    def forward(self, theta: Tensor) -> Tensor:
        """The changed parameter; in training the gates are drawn anew."""
        return theta + torch.where(self.pruned, self.mask, self.gate(self.training)) * self.w

    def gate(self, random: bool) -> Tensor:
        """z, drawn or at u = 1/2."""
        z = self._hard_concrete(self.log_alpha, random)
        if self.group_log_alpha is not None:
            z = z * self._hard_concrete(self.group_log_alpha, random)
        return z

    def expected_count(self) -> Tensor:
        """E‖z‖₀, a scalar; zero after pruning."""
        shift = math.log(-self.low / self.high)
        open_ = (self.log_alpha - shift).sigmoid()
        if self.group_log_alpha is not None:
            open_ = open_ * (self.group_log_alpha - shift).sigmoid()
        return open_.sum() * ~self.pruned

    def _hard_concrete(self, log_alpha: Tensor, random: bool) -> Tensor:
        if random:
            u = torch.rand_like(log_alpha)
            log_alpha = log_alpha + u.log() - (1 - u).log()
        return (log_alpha.sigmoid() * (self.high - self.low) + self.low).clamp(0, 1)


class MagnitudePruning:
    """Cuts the differences to the largest at one step of the training."""

    def __init__(self, config: DiffPruning, changes: list[GatedChange]) -> None:
        self.config = config
        self.changes = changes
        self.size = sum(change.mask.numel() for change in changes)

    def __call__(self, step: int, num_steps: int) -> bool:
        """Prune where it is time; true where it is."""
        if step != max(1, round(self.config.prune_at * num_steps)):
            return False
        self.prune(num_kept(self.config.density, self.size))
        return True

    @torch.no_grad()
    def prune(self, count: int) -> None:
        """Keep the ``count`` largest z ⊙ w as differences of their own, without gates."""
        for change in self.changes:
            change.w.mul_(change.gate(random=False))
            change.pruned.fill_(True)
        kept = largest(torch.cat([c.w.abs().flatten() for c in self.changes]), count)
        parts = kept.split([c.mask.numel() for c in self.changes])
        for change, part in zip(self.changes, parts, strict=True):
            change.mask.copy_(part.view_as(change.mask))
            change.w.mul_(change.mask)
