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
        self._one_of("projection")

    def build(self, host: Host) -> None:
        """Let every parameter be a function of z."""
        parameters = host.distinct(n for n, _ in host.model.named_parameters())
        seed = host.draw_seed() if self.projection_seed is None else self.projection_seed
        coordinates = Coordinates(self.name, parameters, self.dimension, self.projection, seed)
        host.add("z", coordinates, like=next(iter(parameters.values())))
        host.shared.append(f"{host.namespace}.z.z")
        host.reparametrise(list(parameters), coordinates)

    def num_parameters(self, host: Host) -> int:
        """D."""
        return self.dimension


class Coordinates(nn.Module):
    """z ↦ the parameters θ₀ + P z by name; z (d,) starts at zero.

    The seed of P is saved beside z, because z means nothing under another P.

    Args:
        method: its name, for messages.
        parameters: θ₀ by name, D numbers.
        dimension: d.
        kind: "fastfood" or "dense".
        seed: of P.

    Raises:
        InputError: d is above D.
    """

    def __init__(
        self,
        method: str,
        parameters: dict[str, nn.Parameter],
        dimension: int,
        kind: Literal["fastfood", "dense"],
        seed: int,
    ) -> None:
        super().__init__()
        self.full_dim = sum(p.numel() for p in parameters.values())
        if dimension > self.full_dim:
            raise InputError(
                f"{method}: dimension {dimension} is above the {self.full_dim} parameters of the "
                "model."
            )
        self.z = nn.Parameter(torch.zeros(dimension))
        self.register_buffer("seed", torch.tensor(seed))
        self._kind = {"fastfood": FastfoodProjection, "dense": DenseProjection}[kind]
        self._seed = seed
        self._projection: Projection | None = None
        self.base = (dict(parameters),)  # in a tuple: θ₀ stays the base model's own

    @property
    def projection(self) -> Projection:
        """P in the dtype and on the device of z; drawn again when z has moved."""
        made = self._projection
        if made is None or (made.dtype, made.device) != (self.z.dtype, self.z.device):
            made = self._projection = self._kind(
                self.full_dim, len(self.z), self._seed, self.z.dtype, self.z.device
            )
        return made

    def change(self) -> dict[str, Tensor]:
        """P z, cut into the parameters' shapes."""
        (base,) = self.base
        parts = self.projection.lift(self.z).split([p.numel() for p in base.values()])
        return {n: part.view_as(p) for (n, p), part in zip(base.items(), parts, strict=True)}

    def forward(self) -> dict[str, Tensor]:
        """All parameters at the current z."""
        (base,) = self.base
        return {name: base[name] + change for name, change in self.change().items()}
