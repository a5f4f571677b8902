"""Structure-aware intrinsic dimension: a random subspace with a trained gain for every layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.methods.parts.coordinates import Coordinates, Moved, SubspaceDelta
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class StructuredSubspace(SubspaceDelta):
    """θ_i = θ₀_i + λ_i (P z)_i for the layers i = 1..m; z ∈ R^{d-m} and λ ∈ R^m are trained.

    The gains spend m of the d numbers (Aghajanyan et al., Eq. 2), so that d stays the number of
    parameters and d is comparable with that of ``subspace``. Layers are the blocks, the task head,
    and what else there is outside of the blocks, each where it exists. λ starts at one and z at
    zero, so training starts at the base model; λ has a gradient from the second step on.

    Attributes:
        dimension: d.
        projection: the kind of P; see
        `deltacontrol.deltas.methods.parts.coordinates.SubspaceDelta`.
        projection_seed: seed of P; None takes it from the seed of ``attach``.
        of: the delta whose parameters θ is; empty means all parameters of the model.
    """

    name = "said"
    acts_on = "all parameters"
    default_rate = 1e-2
    law = "theta_i = theta_0_i + lambda_i (P z)_i"
    reference = "Aghajanyan, Gupta, Zettlemoyer, ACL 2021, Eq. 2 (SAID)"
    bibtex = r"""
        @inproceedings{aghajanyan2021intrinsic,
          author = {Aghajanyan, Armen and Gupta, Sonal and Zettlemoyer, Luke},
          title = {Intrinsic Dimensionality Explains the Effectiveness of Language Model
            Fine-Tuning},
          booktitle = {Annual Meeting of the Association for Computational Linguistics},
          year = {2021},
        }
    """
    num_parameters_formula = "d = (d - m) + m, m the number of layers with a gain"

    def build(self, host: Host) -> None:
        """Let every parameter be a function of z and λ."""
        seed = self._seed(host)

        def controller(start: dict[str, Tensor], paths: dict[str, str]) -> Moved:
            layers = _layers(host, paths)
            num_gains = max(layers.values()) + 1
            if self.dimension <= num_gains:
                raise InputError(
                    f"said: dimension {self.dimension} leaves nothing beside the gains of "
                    f"{num_gains} layers; choose at least {num_gains + 1}."
                )
            inner = self.dimension - num_gains
            coordinates = Coordinates(self.name, start, inner, self.projection, seed)
            return ScaledCoordinates(coordinates, layers)

        self._lay(host, "coordinates", controller)


def _layers(host: Host, paths: Mapping[str, str]) -> dict[str, int]:
    """The layer of every parameter by name, counted from zero in the order of the model."""
    head = tuple(path + "." for path in host.sites.head_paths())
    found: dict[object, int] = {}
    layers = {}
    for name, path in paths.items():
        layer = host.sites.layer_of(path)
        in_head = (path + ".").startswith(head)
        place = layer if layer is not None else "head" if in_head else "outside"
        layers[name] = found.setdefault(place, len(found))
    return layers


class ScaledCoordinates(Moved):
    """(z, λ) ↦ the parameters by name; shapes: z (d - m,), gains λ (m,)."""

    def __init__(self, coordinates: Coordinates, layers: dict[str, int]) -> None:
        super().__init__()
        self.subspace = coordinates
        self.layers = layers
        self.gains = nn.Parameter(torch.ones(max(layers.values()) + 1))

    def values(self) -> dict[str, Tensor]:
        """All parameters at the present z and λ."""
        start = self.subspace.base()
        return {
            name: start[name] + self.gains[self.layers[name]] * change
            for name, change in self.subspace.change().items()
        }
