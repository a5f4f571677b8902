"""Structure-aware intrinsic dimension: a random subspace with a trained gain for every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from deltas.base import Delta
from deltas.host import Host
from deltas.methods.subspace import Coordinates
from theory.errors import InputError


@dataclass(frozen=True)
class StructuredSubspace(Delta):
    """θ_i = θ₀_i + λ_i (P z)_i for the layers i = 1..m; z ∈ R^{d-m} and λ ∈ R^m are trained.

    The gains spend m of the d numbers (Aghajanyan et al., Eq. 2), so that d stays the number of
    parameters and d is comparable with that of ``subspace``. Layers are the blocks, the task head,
    and what else there is outside of the blocks, each where it exists. λ starts at one and z at
    zero, so training starts at the base model; λ has a gradient from the second step on.

    Attributes:
        dimension: d.
        projection: "fastfood" (d log d, Le et al. 2013) or "dense" (stores D×(d-m) numbers).
        projection_seed: seed of P; None takes it from the seed of ``attach``.
    """

    dimension: int = 1000
    projection: Literal["fastfood", "dense"] = "fastfood"
    projection_seed: int | None = None

    name = "said"
    category = "reparametrisation"
    law = "theta_i = theta_0_i + lambda_i (P z)_i"
    reference = "Aghajanyan, Gupta, Zettlemoyer, ACL 2021, Eq. 2 (SAID)"
    num_parameters_formula = "d = (d - m) + m, m the number of layers with a gain"
    trains_head = True

    def __post_init__(self) -> None:
        """Check the dimension."""
        self._positive("dimension")
        self._one_of("projection")

    def build(self, host: Host) -> None:
        """Let every parameter be a function of z and λ."""
        parameters = host.distinct(n for n, _ in host.model.named_parameters())
        layers = self._layers(host, parameters)
        inner = self.dimension - max(layers.values()) - 1
        if inner < 1:
            raise InputError(
                f"said: dimension {self.dimension} leaves nothing beside the gains of "
                f"{max(layers.values()) + 1} layers; choose at least {max(layers.values()) + 2}."
            )
        seed = host.draw_seed() if self.projection_seed is None else self.projection_seed
        coordinates = Coordinates(self.name, parameters, inner, self.projection, seed)
        controller = ScaledCoordinates(coordinates, layers)
        host.add("coordinates", controller, like=next(iter(parameters.values())))
        host.shared.append(f"{host.namespace}.coordinates.gains")
        host.shared.append(f"{host.namespace}.coordinates.subspace.z")
        host.reparametrise(list(parameters), controller)

    def num_parameters(self, host: Host) -> int:
        """D, gains included."""
        return self.dimension

    def _layers(self, host: Host, names: dict[str, nn.Parameter]) -> dict[str, int]:
        """The layer of every parameter, counted from zero in the order of the model."""
        head = tuple(path + "." for path in host.sites.head_paths())
        found: dict[object, int] = {}
        layers = {}
        for name in names:
            layer = host.sites.layer_of(name)
            place = layer if layer is not None else "head" if name.startswith(head) else "outside"
            layers[name] = found.setdefault(place, len(found))
        return layers


class ScaledCoordinates(nn.Module):
    """(z, λ) ↦ the parameters by name; shapes: z (d - m,), gains λ (m,)."""

    def __init__(self, coordinates: Coordinates, layers: dict[str, int]) -> None:
        super().__init__()
        self.subspace = coordinates
        self.layers = layers
        self.gains = nn.Parameter(torch.ones(max(layers.values()) + 1))

    def forward(self) -> dict[str, Tensor]:
        """All parameters at the present z and λ."""
        (base,) = self.subspace.base
        return {
            name: base[name] + self.gains[self.layers[name]] * change
            for name, change in self.subspace.change().items()
        }
