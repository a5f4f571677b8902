"""Training in a random subspace of all parameters (direct intrinsic dimension)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from deltas.base import Delta
from deltas.host import Host
from theory.errors import InputError
from theory.projections import DenseProjection, FastfoodProjection, Projection


@dataclass(frozen=True)
class Subspace(Delta):
    """θ = θ₀ + P z with a fixed random P ∈ R^{D×d} and z ∈ R^d trained (Li et al., Eq. 2).

    All parameters move, the head included, so D is the model's size. P z is computed in every
    forward pass, without P ever being formed when ``projection="fastfood"``.

    Attributes:
        dimension: d.
        projection: "fastfood" (d log d, Le et al. 2013) or "dense" (stores D×d numbers).
        projection_seed: seed of P; None takes it from the seed of ``attach``.
    """

    dimension: int = 1000
    projection: Literal["fastfood", "dense"] = "fastfood"
    projection_seed: int | None = None

    name = "subspace"
    category = "reparametrisation"
    law = "theta = theta_0 + P z"
    reference = "Li et al., ICLR 2018, Eq. 2; Aghajanyan et al., ACL 2021, Eq. 1 (DID)"
    num_parameters_formula = "d"
    trains_head = True

    def __post_init__(self) -> None:
        """Check the dimension."""
        self._positive("dimension")

    def build(self, host: Host) -> None:
        """Let every parameter be a function of z."""
        parameters = host.distinct(n for n, _ in host.model.named_parameters())
        full_dim = sum(p.numel() for p in parameters.values())
        if self.dimension > full_dim:
            raise InputError(
                f"subspace: dimension {self.dimension} is above the {full_dim} parameters of the "
                "model."
            )
        like = host.model.get_input_embeddings().weight
        seed = self.projection_seed
        if seed is None:
            seed = int(torch.randint(2**31, (), generator=host.generator))
        kind = {"fastfood": FastfoodProjection, "dense": DenseProjection}[self.projection]
        projection = kind(full_dim, self.dimension, seed=seed, dtype=like.dtype, device=like.device)
        coordinates = Coordinates(projection, parameters)
        host.add("z", coordinates, like=like)
        host.shared.append(f"{host.namespace}.z.z")
        host.reparametrise(list(parameters), coordinates)

    def num_parameters(self, host: Host) -> int:
        """D."""
        return self.dimension


class Coordinates(nn.Module):
    """z ↦ the parameters θ₀ + P z by name; z (d,) starts at zero."""

    def __init__(self, projection: Projection, parameters: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.zeros(projection.sub_dim))
        self.projection = projection
        self.__dict__["base"] = dict(parameters)  # θ₀ stays the base model's own

    def forward(self) -> dict[str, Tensor]:
        """All parameters at the current z."""
        base: dict[str, Tensor] = self.__dict__["base"]
        change = self.projection.lift(self.z).split([p.numel() for p in base.values()])
        moved = zip(base.items(), change, strict=True)
        return {name: theta + delta.view_as(theta) for (name, theta), delta in moved}
