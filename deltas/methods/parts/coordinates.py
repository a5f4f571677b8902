"""Coordinates of a random subspace, over a model's parameters or over those of another delta."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from deltacontrol.deltas.base import Delta
from deltacontrol.deltas.editing.host import Host
from deltacontrol.deltas.methods.parts.governed import Governed
from deltacontrol.theory.dimension.projections import RANDOM_PROJECTIONS, Projection, ProjectionName
from deltacontrol.theory.errors import InputError


@dataclass(frozen=True)
class SubspaceDelta(Delta):
    """What deltas in a random subspace share: θ = θ₀ + P z.

    Attributes:
        dimension: d.
        projection: the kind of P: fastfood (never a matrix, d log d; Le et al. 2013), dense (a
            stored orthonormal frame), gaussian (drawn anew in every pass), sparse-sign, srht or
            kronecker; see `deltacontrol.theory.dimension.projections`.
        projection_seed: seed of P; None takes it from the seed of ``attach``.
        of: the delta whose parameters θ is, such as ``lora:rank=8;alpha=16``; empty means all
            parameters of the model.
    """

    dimension: int = 1000
    projection: ProjectionName = "fastfood"
    projection_seed: int | None = None
    of: str = ""

    category = "reparametrisation"
    trains_head = True
    unstackable = "parameters are functions of a control, other ones in each copy"

    def __post_init__(self) -> None:
        """Check the fields, and take over what follows from the delta that this one acts over."""
        self._positive("dimension")
        self._one_of("projection")
        if inner := self._inner:
            if isinstance(inner, SubspaceDelta):
                raise InputError(
                    f"{self.name}: of={self.of} is a subspace itself, and a subspace of it is one "
                    "of what it acts over; give that, and the smaller dimension."
                )
            for name in ("trains_head", "identity_at_start", "unmergeable"):
                object.__setattr__(self, name, getattr(inner, name))

    @cached_property
    def _inner(self) -> Delta | None:
        from deltacontrol.deltas.registry import parse  # which imports this module

        # Commas separate the fields of this delta where it is written as a text itself.
        return parse(self.of.replace(";", ",")) if self.of else None

    def num_parameters(self, host: Host) -> int:
        """D."""
        return self.dimension

    def _seed(self, host: Host) -> int:
        return host.draw_seed() if self.projection_seed is None else self.projection_seed

    def _lay(
        self, host: Host, key: str, controller: Callable[[dict[str, Tensor], dict[str, str]], Moved]
    ) -> None:
        """Let parameters be a function of a controller of this delta.

        Args:
            host: the model.
            key: of the controller.
            controller: makes it from θ₀ by name and the path in the base model of each.
        """
        if self._inner is None:
            parameters = host.distinct(n for n, _ in host.model.named_parameters())
            moved = controller(dict(parameters), {name: name for name in parameters})
            host.add(key, moved, like=next(iter(parameters.values())))
            host.reparametrise(list(parameters), moved)
        else:
            inner, made = self._inner, []
            governed = Governed(host, lambda: inner.build(host), lambda: made[0]())
            moved = controller(governed.start, governed.paths)
            made.append(moved)
            host.add(key, moved, like=next(iter(governed.start.values())))
        host.shared += [f"{host.namespace}.{key}.{name}" for name, _ in moved.named_parameters()]


class Moved(nn.Module):
    """A controller whose call gives parameters by name."""

    is_held = False
    _kept: dict[str, Tensor] | None = None

    def values(self) -> dict[str, Tensor]:
        """The present values, computed anew."""
        raise NotImplementedError

    def forward(self) -> dict[str, Tensor]:
        """The present values, or those of the first call inside `held`."""
        if not self.is_held:
            return self.values()
        if self._kept is None:
            self._kept = self.values()
        return self._kept


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Let parameters in a subspace be computed once for all passes inside.

    For passes between which no control changes, such as those of an evaluation.
    """
    moved = [module for module in model.modules() if isinstance(module, Moved)]
    for module in moved:
        module.is_held = True
    try:
        yield
    finally:
        for module in moved:
            module.is_held, module._kept = False, None


class Coordinates(Moved):
    """z ↦ the parameters θ₀ + P z by name; z (d,) starts at zero.

    The seed of P is saved beside z, because z means nothing under another P; so is the version of
    the draws, where it is not the first. θ₀ is saved too where it belongs to a delta: there it is
    an initial value that was drawn.

    Args:
        method: its name, for messages.
        parameters: θ₀ by name, D numbers.
        dimension: d.
        kind: of the projection.
        seed: of P.

    Raises:
        InputError: d is above D.
    """

    start: Tensor

    def __init__(
        self,
        method: str,
        parameters: dict[str, Tensor],
        dimension: int,
        kind: ProjectionName,
        seed: int,
    ) -> None:
        super().__init__()
        self.full_dim = sum(p.numel() for p in parameters.values())
        if dimension > self.full_dim:
            of_model = all(isinstance(p, nn.Parameter) for p in parameters.values())
            raise InputError(
                f"{method}: dimension {dimension} is above the {self.full_dim} parameters of the "
                f"{'model' if of_model else 'delta that it acts over'}."
            )
        self.z = nn.Parameter(torch.zeros(dimension))
        self.register_buffer("seed", torch.tensor(seed))
        self._kind = RANDOM_PROJECTIONS[kind]
        if self._kind.draws > 1:
            self.register_buffer("fixed_draws", torch.tensor(self._kind.draws))
        self._seed = seed
        self._projection: Projection | None = None
        self._shapes = {name: p.shape for name, p in parameters.items()}
        # The base model's own parameters go where it goes; in a tuple, so that they stay its own.
        self._base = tuple(p for p in parameters.values() if isinstance(p, nn.Parameter))
        if not self._base:
            self.register_buffer("start", torch.cat([p.flatten() for p in parameters.values()]))

    @property
    def projection(self) -> Projection:
        """P in the dtype and on the device of z; drawn again when z has moved."""
        made = self._projection
        if made is None or (made.dtype, made.device) != (self.z.dtype, self.z.device):
            made = self._projection = self._kind(
                self.full_dim, len(self.z), self._seed, self.z.dtype, self.z.device
            )
        return made

    def base(self) -> dict[str, Tensor]:
        """θ₀ by name."""
        if self._base:
            return dict(zip(self._shapes, self._base, strict=True))
        return self._cut(self.start)

    def change(self) -> dict[str, Tensor]:
        """P z, cut into the parameters' shapes."""
        return self._cut(self.projection @ self.z)

    def _cut(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([shape.numel() for shape in self._shapes.values()])
        return {n: part.view(s) for (n, s), part in zip(self._shapes.items(), parts, strict=True)}

    def values(self) -> dict[str, Tensor]:
        """All parameters at the current z."""
        change = self.change()
        return {name: start + change[name] for name, start in self.base().items()}
