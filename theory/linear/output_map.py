"""Dense rows of a linear map from controls to outputs, and everything exact about them.

``y = sum_t C_t du_t`` with the control energy ``1/2 sum_t du_t' R_t du_t``, ``R_t`` diagonal, has
the Gramian ``W = sum_t C_t R_t^-1 C_t'``. An output change ``y`` is reached if ``W W^+ y = y``;
then the least energy is ``1/2 y' W^+ y``, spent by ``du_t = R_t^-1 C_t' W^+ y`` and by no other
control. Otherwise the same formulae reach the nearest output, and ``y - W W^+ y`` is the part that
no control reaches.

Access. ``access[t] = diag(R_t^-1) >= 0`` weighs the entries of ``u_t``: 0 switches an entry off.
A `Part` ``{t: entries}`` keeps some entries of some steps, indices of the flat control without
repetition: one layer, or one site of a layer.

Sources: Kalman, Ho & Narendra, *Controllability of linear dynamical systems*, Contributions to
Differential Equations 1, 1963 (Gramian and least energy); Golub & Van Loan, *Matrix Computations*,
2013, sections 5.5 and 5.6 (least norm by orthogonal factors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from deltacontrol.theory.control.problem import Controls
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.operator import LinearOperator

__all__ = ["Gain", "MinimumEnergy", "OutputMap", "Part", "linear_quadratic_gain"]

Part: TypeAlias = Mapping[int, "slice | Tensor"]


@dataclass(frozen=True, eq=False)
class MinimumEnergy:
    """The control of least energy to a target output change.

    Attributes:
        energy: ``1/2 sum_t du_t' R_t du_t``.
        per_step: its terms.
        control: ``du``.
        multiplier: ``W^+ y``, of the shape of the target; the derivative of the energy by it.
        unreachable: the target minus what ``du`` reaches.
        num_products: products with ``W``; 0 where it was dense.
        converged: whether the solver reached its tolerance; always True where ``W`` was dense.
    """

    energy: float
    per_step: tuple[float, ...]
    control: Controls
    multiplier: Tensor
    unreachable: Tensor
    num_products: int = 0
    converged: bool = True


@dataclass(frozen=True, eq=False, repr=False)
class OutputMap(LinearOperator):
    """Dense rows of the map from controls to outputs: ``y = sum_t C_t du_t``.

    As an operator it takes the flat controls to the ``n`` outputs.

    Attributes:
        blocks: ``C_t``, ``(n, number of entries of u_t)``, for each step.
        access: ``diag(R_t^-1)``, flat, for each step.
        control_shapes: the shapes of the ``u_t``.
    """

    blocks: tuple[Tensor, ...]
    access: tuple[Tensor, ...]
    control_shapes: tuple[torch.Size, ...]

    def __post_init__(self) -> None:
        """Keep the sizes."""
        first, entries = self.blocks[0], sum(C.shape[1] for C in self.blocks)
        super().__init__((len(first), entries), first.dtype, first.device)

    @classmethod
    def stack(cls, maps: Sequence[OutputMap]) -> OutputMap:
        """The map of an ensemble, from those of examples that do not interact, one shared control.

        The rows of each example cost an adjoint through that example alone, which those of a batch
        do not.

        Raises:
            InputError: if there is none, or two have other controls or another access.
        """
        if not maps:
            raise InputError("stack needs at least one output map")
        first = maps[0]
        for other in maps[1:]:
            same = other.control_shapes == first.control_shapes and all(
                torch.equal(a, b) for a, b in zip(other.access, first.access, strict=True)
            )
            if not same:
                raise InputError(
                    "the output maps have controls of different shapes or access; stack maps of "
                    "one control that the examples share"
                )
        steps = range(len(first.blocks))
        blocks = tuple(torch.cat([m.blocks[t] for m in maps]) for t in steps)
        return cls(blocks, first.access, first.control_shapes)

    def weighted(self, part: Part | None = None) -> Tensor:
        """``S = C R^(-1/2)`` with the columns of a part, ``(n, entries)``; ``W = S S'``."""
        part = self._part(part)
        columns = [self.blocks[t][:, e] * self.access[t][e].sqrt() for t, e in part.items()]
        return torch.cat(columns, dim=1) if columns else self.blocks[0][:, :0]

    def gramian(self, part: Part | None = None) -> Tensor:
        """``W = sum_t C_t R_t^-1 C_t'``, ``(n, n)``, of all entries or of a part of them."""
        S = self.weighted(part)
        return S @ S.mT

    def _product(self, x: Tensor) -> Tensor:
        parts = x.split([C.shape[1] for C in self.blocks], -1)
        products = [u @ C.mT for C, u in zip(self.blocks, parts, strict=True)]
        return torch.stack(products).sum(0)

    def _transpose_product(self, y: Tensor) -> Tensor:
        return torch.cat([y @ C for C in self.blocks], -1)

    def minimum_energy(
        self, target: Tensor, part: Part | None = None, *, rtol: float | None = None
    ) -> MinimumEnergy:
        """The control of least energy to ``target``, by the singular values of ``C R^(-1/2)``.

        Args:
            target: ``y``, with ``n`` entries.
            part: the entries that may move; the others stay zero.
            rtol: singular values up to ``rtol`` times the largest count as zero, by default
                ``max(n, entries)`` times the precision, as `numpy.linalg.lstsq` has it.

        Raises:
            InputError: if the target has another number of entries.
        """
        if target.numel() != self.shape[0]:
            raise InputError(
                f"the target has shape {tuple(target.shape)}, hence {target.numel()} entries; "
                f"expected {self.shape[0]}, one per output"
            )
        S, y = self.weighted(part), target.reshape(-1)
        if rtol is None:
            rtol = max(S.shape) * torch.finfo(S.dtype).eps
        # W = R'R with S' = QR: the singular values of R have the precision that those of W lose.
        triangular = torch.linalg.qr(S.mT, mode="r")[1]
        singular, right = torch.linalg.svd(triangular, full_matrices=False)[1:]
        kept = singular > rtol * singular.max() if len(singular) else singular > 0
        singular, right = singular[kept], right[kept]
        multiplier = right.mT @ ((right @ y) / singular.square())
        control = self._control(multiplier, part)
        reached = right.mT @ (right @ y)
        per_step = energies(control, self.access)
        return MinimumEnergy(
            sum(per_step),
            per_step,
            control,
            multiplier.reshape(target.shape),
            (y - reached).reshape(target.shape),
        )

    def _control(self, multiplier: Tensor, part: Part | None) -> Controls:
        flat = [torch.zeros_like(a) for a in self.access]
        for t, entries in self._part(part).items():
            pulled = self.blocks[t][:, entries].mT @ multiplier
            flat[t][entries] = self.access[t][entries] * pulled
        shapes = self.control_shapes
        return tuple(u.reshape(shape) for u, shape in zip(flat, shapes, strict=True))

    def _part(self, part: Part | None) -> Part:
        if part is None:
            return {t: slice(None) for t in range(len(self.blocks))}
        return checked_part(part, len(self.blocks))


@dataclass(frozen=True, eq=False)
class Gain:
    """What the linear-quadratic model says that a control can gain.

    Attributes:
        objective_drop: fall of ``loss + weight_decay/2 ||du||^2``, at its minimum.
        loss_drop: fall of the quadratic model of the loss alone, there.
        energy: ``1/2 du'R du`` there.
        output: the output change ``y`` there.
    """

    objective_drop: float
    loss_drop: float
    energy: float
    output: Tensor


def linear_quadratic_gain(
    gramian: Tensor, gradient: Tensor, hessian: Tensor, weight_decay: float
) -> Gain:
    """The gain of the best control, from its Gramian alone.

    With the loss ``g'y + 1/2 y'Hy`` of the output change ``y = C du`` and the running cost
    ``weight_decay/2 du'R du``, ``y* = -(lambda I + W H)^-1 W g`` and the objective falls by

        1/2 g' (lambda I + W H)^-1 W g,

    since ``C (lambda R + C'HC)^-1 C' = (lambda I + W H)^-1 W``.

    Args:
        gramian: ``W``, ``(n, n)``.
        gradient: ``g``, ``(n,)``.
        hessian: ``H``, ``(n, n)``, symmetric positive semidefinite.
        weight_decay: ``lambda``, positive.

    Raises:
        InputError: if the weight decay is not positive or the shapes do not fit.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> linear_quadratic_gain(2 * one, one[0], 3 * one, 4.0).objective_drop  # 1/2 * 2/(4 + 6)
        0.1
    """
    n = gradient.numel()
    if gradient.shape != (n,) or gramian.shape != (n, n) or hessian.shape != (n, n):
        raise InputError(
            f"gramian {tuple(gramian.shape)}, gradient {tuple(gradient.shape)} and hessian "
            f"{tuple(hessian.shape)} do not fit; expected (n, n), (n,) and (n, n)"
        )
    if not weight_decay > 0:
        raise InputError(
            f"weight_decay is {weight_decay}; expected a positive number: without it every "
            "reachable output is free"
        )
    eye = torch.eye(n, dtype=gramian.dtype, device=gramian.device)
    y = -torch.linalg.solve(weight_decay * eye + gramian @ hessian, gramian @ gradient)
    slope = gradient + hessian @ y
    energy = 0.5 * slope @ gramian @ slope / weight_decay**2
    loss = -(gradient @ y) - 0.5 * y @ hessian @ y
    return Gain(float(-0.5 * gradient @ y), float(loss), float(energy), y)


def energies(control: Controls, access: Sequence[Tensor]) -> tuple[float, ...]:
    """``1/2 du_t' R_t du_t``; an entry without access does not move."""
    terms = []
    for u, a in zip(control, access, strict=True):
        weight = torch.where(a > 0, a, torch.ones_like(a)).reshape(u.shape)
        terms.append(0.5 * float((u.square() / weight).sum()))
    return tuple(terms)


def checked_part(part: Part, horizon: int) -> Part:
    wrong = [t for t in part if not 0 <= t < horizon]
    if wrong:
        raise InputError(f"the part names step {wrong[0]}; expected 0 to {horizon - 1}")
    return part
