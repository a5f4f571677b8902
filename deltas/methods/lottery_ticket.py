"""Lottery ticket: train everything for a while, keep what moved most, start again with it alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.methods.parts.masks import check_density, largest, maskable, num_kept
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class LotteryTicket(Delta):
    """θ₀ + m ⊙ δ with the mask m found by iterative magnitude pruning of δ, and rewinding.

    The first ``search`` of the steps are cut into ``rounds`` of equal length. At the end of round j
    of R, m keeps the density^(j/R)·D entries of δ that are largest among those alive, δ goes back
    to zero, which is the pre-trained model, and the optimiser starts afresh (Frankle & Carbin,
    Section 1, with the movement as magnitude: Ansell et al., Section 3.1). The steps that remain
    train the ticket. The learning rate goes on along its schedule.

    The search needs all of the D numbers, and δ, m and the moments keep their room afterwards;
    after it k = density·D of them change.

    Attributes:
        density: k/D.
        rounds: R.
        search: fraction of the steps in which the ticket is sought.
        sites: modules to choose from; None means the backbone.
        layers: blocks to choose from; None means all.
    """

    density: float = 0.005
    rounds: int = 1
    search: float = 0.3
    sites: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    name = "lottery-ticket"
    acts_on = "all parameters"
    default_rate = 1e-4
    category = "specification"
    law = "theta_0 + m delta, m keeps what moved most"
    reference = (
        "Ansell, Ponti, Korhonen, Vulić, ACL 2022, Section 3.1; Frankle & Carbin, ICLR 2019, "
        "Section 1"
    )
    bibtex = r"""
        @inproceedings{ansell2022composable,
          author = {Ansell, Alan and Ponti, Edoardo Maria and Korhonen, Anna and Vuli{\'c},
            Ivan},
          title = {Composable Sparse Fine-Tuning for Cross-Lingual Transfer},
          booktitle = {Annual Meeting of the Association for Computational Linguistics},
          year = {2022},
        }
        @inproceedings{frankle2019lottery,
          author = {Frankle, Jonathan and Carbin, Michael},
          title = {The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks},
          booktitle = {International Conference on Learning Representations},
          year = {2019},
        }
    """
    num_parameters_formula = "D while it is sought, of which density D remain"

    def __post_init__(self) -> None:
        """Check density, rounds and search."""
        check_density(self.name, self.density)
        self._positive("rounds")
        if not 0 < self.search < 1:
            raise InputError(
                f"lottery-ticket: search is {self.search}; expected a fraction of the steps, "
                "between 0 and 1."
            )

    def build(self, host: Host) -> None:
        """Let the parameters be θ₀ + m ⊙ δ, and prune as training goes."""
        parameters = maskable(host, self.sites, self.layers)
        changes = {}
        for name, theta in parameters.items():
            changes[name] = MaskedChange(theta)
            host.add(name.rpartition(".")[0], changes[name], like=theta, key=name)
            host.shared.append(f"{host.namespace}.{name}.change")

        def values() -> dict[str, Tensor]:
            return {name: changes[name](theta) for name, theta in parameters.items()}

        host.reparametrise(list(parameters), values)
        host.on_step(Pruning(self, list(changes.values())))

    def num_parameters(self, host: Host) -> int:
        """D."""
        return sum(p.numel() for p in maskable(host, self.sites, self.layers).values())


class MaskedChange(nn.Module):
    """θ ↦ θ + mask ⊙ change; all of the shape of θ."""

    mask: Tensor

    def __init__(self, theta: Tensor) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros_like(theta))
        self.register_buffer("mask", torch.ones_like(theta, dtype=torch.bool))

    def forward(self, theta: Tensor) -> Tensor:
        """The changed parameter."""
        return theta + self.mask * self.change


class Pruning:
    """Prunes and rewinds at the end of every round."""

    def __init__(self, config: LotteryTicket, changes: list[MaskedChange]) -> None:
        self.config = config
        self.changes = changes
        self.size = sum(change.mask.numel() for change in changes)

    def __call__(self, step: int, num_steps: int) -> bool:
        """Prune where a round ends; true where it does."""
        done = self._rounds(step, num_steps)
        if done == self._rounds(step - 1, num_steps):
            return False
        self.prune(num_kept(self.config.density ** (done / self.config.rounds), self.size))
        return True

    def _rounds(self, step: int, num_steps: int) -> int:
        """Rounds that have ended after so many steps."""
        length = self.config.search * num_steps / self.config.rounds
        return min(int(step / length), self.config.rounds)

    @torch.no_grad()
    def prune(self, count: int) -> None:
        """Keep the ``count`` largest changes of those alive, and rewind all of them."""
        alive = torch.cat([c.mask.flatten() for c in self.changes])
        moved = torch.cat([c.change.abs().flatten() for c in self.changes])
        kept = largest(moved.masked_fill_(~alive, -1.0), count)
        parts = kept.split([c.mask.numel() for c in self.changes])
        for change, part in zip(self.changes, parts, strict=True):
            change.mask.copy_(part.view_as(change.mask))
            change.change.zero_()
