"""Selected modules: all parameters of chosen modules are trained."""

from __future__ import annotations

from dataclasses import dataclass

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.editing.sites import whole_paths
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class SelectedModules(Delta):
    """θ_S = u for the parameters S of the chosen modules, u₀ = θ₀: a specification by hand.

    The default trains the attention alone, which in vision transformers comes close to training
    everything (Touvron et al.).

    Attributes:
        sites: modules whose parameters are trained.
        layers: blocks to act in; None means all.
    """

    sites: tuple[str, ...] = (
        "attention.query",
        "attention.key",
        "attention.value",
        "attention.output",
    )
    layers: tuple[int, ...] | None = None

    name = "selected-modules"
    acts_on = "chosen modules"
    searched_rates = (3e-4, 1e-3, 3e-3, 1e-2)
    category = "specification"
    law = "θ_S = u"
    reference = "Touvron et al., ECCV 2022, Section 4 (attention only)"
    bibtex = r"""
        @inproceedings{touvron2022three,
          author = {Touvron, Hugo and Cord, Matthieu and El-Nouby, Alaaeldin and Verbeek,
            Jakob and J{\'e}gou, Herv{\'e}},
          title = {Three Things Everyone Should Know about Vision Transformers},
          booktitle = {European Conference on Computer Vision},
          year = {2022},
        }
    """
    num_parameters_formula = "sum of the sizes of the chosen modules"

    def build(self, host: Host) -> None:
        """Replace the modules' parameters by trainable copies."""
        host.replace(self._names(host))

    def num_parameters(self, host: Host) -> int:
        """Number of parameters of the chosen modules."""
        return sum(p.numel() for p in host.distinct(self._names(host)).values())

    def _names(self, host: Host) -> list[str]:
        names = host.parameter_names(whole_paths(host.find(self.sites, self.layers), self.name))
        if not names:
            raise InputError(
                f"selected-modules: {', '.join(self.sites)} of {host.sites.model_type} have no "
                "parameters; choose modules that have some, such as mlp.down."
            )
        return names
