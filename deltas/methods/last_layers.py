"""Partial fine-tuning: only the last blocks are trained."""

from __future__ import annotations

from dataclasses import dataclass

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class LastLayers(Delta):
    """u_t = θ_t for t ≥ L - k, no control before; u₀ = θ₀.

    Attributes:
        num_layers: k, how many of the last blocks.
    """

    num_layers: int = 1

    name = "last-layers"
    look = ("last layers", "#56B4E9", "<", 7)
    acts_on = "last blocks"
    searched_rates = (3e-4, 1e-3, 3e-3, 1e-2)
    category = "specification"
    law = "θ_t = u_t, t >= L - k"
    reference = "Lee, Tang, Lin, arXiv 1911.03090, Section 3"
    bibtex = r"""
        @misc{lee2019elsa,
          author = {Lee, Jaejun and Tang, Raphael and Lin, Jimmy},
          title = {What Would {Elsa} Do? Freezing Layers During Transformer Fine-Tuning},
          eprint = {1911.03090},
          archiveprefix = {arXiv},
          year = {2019},
        }
    """
    num_parameters_formula = "sum of the sizes of the last k blocks"

    def __post_init__(self) -> None:
        """Check k."""
        self._positive("num_layers")

    def build(self, host: Host) -> None:
        """Replace the last blocks' parameters by trainable copies."""
        host.replace(self._names(host))

    def num_parameters(self, host: Host) -> int:
        """Number of parameters of the last k blocks."""
        return sum(p.numel() for p in host.distinct(self._names(host)).values())

    def _names(self, host: Host) -> list[str]:
        host.sites.check_called_once(
            self.name, "choose full, or selected-modules for the shared block"
        )
        blocks = host.sites.block_paths
        if self.num_layers > len(blocks):
            raise InputError(
                f"last-layers: num_layers is {self.num_layers}, but {host.sites.model_type} has "
                f"{len(blocks)} blocks."
            )
        return host.parameter_names(blocks[-self.num_layers :])
