"""Training in a random subspace of all parameters (direct intrinsic dimension)."""

from __future__ import annotations

from collections.abc import Callable
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
        like = next(host.model.parameters())
        seed = self.projection_seed
        if seed is None:
            seed = int(torch.randint(2**31, (), generator=host.generator))
        kind = {"fastfood": FastfoodProjection, "dense": DenseProjection}[self.projection]

        def project(dtype: torch.dtype, device: torch.device) -> Projection:
            return kind(full_dim, self.dimension, seed=seed, dtype=dtype, device=device)

        coordinates = Coordinates(self.dimension, seed, project, parameters)
        host.add("z", coordinates, like=like)
        host.shared.append(f"{host.namespace}.z.z")
        host.reparametrise(list(parameters), coordinates)

    def num_parameters(self, host: Host) -> int:
        """D."""
        return self.dimension


class Coordinates(nn.Module):
    """z ↦ the parameters θ₀ + P z by name; z (d,) starts at zero.

    The seed of P is saved beside z, because z means nothing under another P.
    """

    def __init__(
        self,
        dimension: int,
        seed: int,
        project: Callable[[torch.dtype, torch.device], Projection],
        parameters: dict[str, nn.Parameter],
    ) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.zeros(dimension))
        self.register_buffer("seed", torch.tensor(seed))
        self._project = project
        self._projection: Projection | None = None
        self.__dict__["base"] = dict(parameters)  # θ₀ stays the base model's own

    @property
    def projection(self) -> Projection:
        """P in the dtype and on the device of z; drawn again when z has moved."""
        made = self._projection
        if made is None or (made.dtype, made.device) != (self.z.dtype, self.z.device):
            made = self._projection = self._project(self.z.dtype, self.z.device)
        return made

    def forward(self) -> dict[str, Tensor]:
        """All parameters at the current z."""
        base: dict[str, Tensor] = self.__dict__["base"]
        change = self.projection.lift(self.z).split([p.numel() for p in base.values()])
        moved = zip(base.items(), change, strict=True)
        return {name: theta + delta.view_as(theta) for (name, theta), delta in moved}
