"""Linearised delta-tuning as a convex program with a certificate.

Around controls ``u0`` the logits of a model are affine in the change ``u`` of the controls,
``z_i(u) = z_i + G_i u``, so that

    P(u) = 1/N sum_i l(z_i + G_i u; y_i) + R(u)

is convex. Fenchel's dual of it is ``max_a D(a)`` with

    D(a) = 1/N sum_i [ <a_i, z_i> - l*(a_i; y_i) ] - R*( -1/N sum_i G_i'a_i ).

*Weak duality.* For every ``a`` and ``u``, with ``v = -1/N sum_i G_i'a_i``, the conjugates give
``l(z) >= <a, z> - l*(a)`` and ``R(u) >= <u, v> - R*(v)``. In their sum the terms with ``u`` cancel,
``1/N sum_i <a_i, G_i u> + <u, v> = 0``, so ``P(u) >= D(a)``. A pair thus proves
``P(u) - min P <= P(u) - D(a)``, whoever found it.

*Strong duality.* ``l`` is finite everywhere, so the two optima are equal (Slater), and at them
``a_i = grad l(z_i + G_i u)``.

*The certificate.* A solver's ``u`` gives ``a = grad l(z + G u)``, which is in the domain of ``l*``;
its multipliers of the equation that defines the logits are another estimate of ``a``, moved by
rounding into that domain. For both, ``R*(v)`` may still be infinite, because some ``||v_g||_o``
exceeds ``lambda w_g`` a little. For every ``0 <= s <= 1`` the multiple ``s a`` is in the domain of
``l*`` too (`deltacontrol.theory.convex.losses`), so ``s = min(1, lambda / max_g ||v_g||_o / w_g)``
makes feasible points. ``D`` is evaluated at both and ``P(u) - D`` of the better one is reported: whatever
the solver returns, it is a proof, and never the solver's word.

*The largest weight.* ``u = 0`` is optimal exactly if ``a = grad l(z)`` has ``R*(v) = 0``, that is
from ``lambda = max_g ||v_g||_o / w_g`` on.

*What is certainly zero.* ``D`` is ``1/(N S)``-strongly concave for a loss of smoothness ``S``, so
the dual optimum is within ``(2 N S gap)^(1/2)`` of ``a``. Its ``v_g`` is within ``||G_g||/N`` times
this of ours, and a group, or a singular direction, whose ``v_g`` cannot reach ``lambda w_g`` is
zero in every optimum. Such groups are set to zero.

Source: Borwein & Lewis, *Convex Analysis and Nonlinear Optimization*, 2006, theorem 3.3.5; Ndiaye,
Fercoq, Gramfort & Salmon, JMLR 18(128), 2017, theorem 2 (the safe sphere) and proposition 4.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltacontrol.theory.control.problem import Box
from deltacontrol.theory.convex.blocks import as_matrix, blocks, check_memory, named_groups
from deltacontrol.theory.convex.features import Features, as_array, contrasts
from deltacontrol.theory.convex.losses import named
from deltacontrol.theory.convex.penalties import BoxedRidge, Penalty, Ridge, Working
from deltacontrol.theory.convex.program import Program, Restricted
from deltacontrol.theory.convex.solution import ACTIVE, ConvexSolution, ConvexStatus
from deltacontrol.theory.errors import InputError

__all__ = ["ConvexTuning"]


class ConvexTuning:
    """Minimise ``1/N sum_i l(z_i + G_i u; y_i) + R(u)`` over the change ``u`` of the controls.

    Args:
        features: ``G``. One tensor ``(N, K, m)``; or one entry for each group, by name or in
            order: tensors ``(N, K, m_g)`` or ``(N, K, p, q)``, or `OuterProducts`.
        labels: ``(N,)`` class numbers, or ``(N, K)`` targets.
        groups: the sizes of the groups that a single tensor is split into.
        offset: the logits ``z`` at ``u = 0``, ``(N, K)``; zero by default.
        loss: "cross-entropy" or "squared-error" (half of it).
        penalty: `Ridge`, `NormBall`, `GroupLasso` or `NuclearNorm`.
        box: bounds on the controls, one bound for each group; only with `Ridge`.
        tolerance: the largest gap, relative to ``max(1, |P|)``, that counts as optimal.
        solver: "auto" (Clarabel; where it fails OSQP for a quadratic and SCS for a conic
            program), or one of "clarabel", "osqp" and "scs".
        memory_limit: the largest size of the features in bytes.

    Raises:
        InputError: for shapes and labels that do not fit, features that are not finite or too
            large, and a box with a penalty that cannot have one.

    Example:
        Half the squared error with orthonormal features and group lasso is soft thresholding:

        >>> from deltacontrol.theory import GroupLasso
        >>> features = torch.eye(2, dtype=torch.float64).reshape(2, 1, 2)
        >>> labels = torch.tensor([3.0, 1.0], dtype=torch.float64)
        >>> lasso = GroupLasso()
        >>> tuning = ConvexTuning(features, labels, groups=(1, 1), loss="squared-error",
        ...                       penalty=lasso)
        >>> tuning.largest_weight
        1.5
        >>> solution = tuning.solve(1.0)
        >>> solution.active, round(float(solution.controls[0]), 6)
        (('0',), 1.0)
    """

    def __init__(
        self,
        features: Tensor | Sequence[Tensor | Features] | Mapping[str, Tensor | Features],
        labels: Tensor,
        *,
        groups: Sequence[int] | None = None,
        offset: Tensor | None = None,
        loss: str = "cross-entropy",
        penalty: Penalty | None = None,
        box: Box | None = None,
        tolerance: float = 1e-7,
        solver: str = "auto",
        memory_limit: int = 2**31,
    ) -> None:
        if not tolerance > 0:
            raise InputError(f"the tolerance is {tolerance}; expected a positive gap, such as 1e-7")
        self.loss, self.tolerance = named(loss), tolerance
        self.names, found = named_groups(features, groups)
        first = found[0]
        sizes = (first.num_examples, first.num_logits)
        for name, group in zip(self.names, found, strict=True):
            if (group.num_examples, group.num_logits) != sizes:
                raise InputError(
                    f"the features of {name} are for {group.num_examples} examples and "
                    f"{group.num_logits} logits, those of {self.names[0]} for {sizes[0]} and "
                    f"{sizes[1]}; all groups act on the same logits"
                )
            check_memory(name, group, memory_limit)
        self.shapes = tuple(group.shape for group in found)
        self._targets = self.loss.targets(labels, sizes)
        self._offset = _offset(offset, sizes)
        self.penalty = (penalty or Ridge()).fitted(self.shapes)
        if box is not None:
            self.penalty = self._boxed(box)
        # The loss sees z = offset + C y of the logits y that the blocks give.
        self._contrasts = contrasts(sizes[1]) if self.loss.shift_invariant else np.eye(sizes[1])
        if self.loss.shift_invariant:
            found = [f.contrasted(self._contrasts) for f in found]
        self._blocks = blocks(found, self.penalty, memory_limit)
        quadratic = self.loss.quadratic and isinstance(self.penalty, Ridge)
        self._solver = (solver, quadratic)
        self._programs: dict[tuple, Program] = {}

    def with_labels(self, labels: Tensor, *, offset: Tensor | None = None) -> ConvexTuning:
        """The same features with other labels (and offsets); the compiled programs are shared."""
        other = copy.copy(self)
        shape = (self._offset.shape[0], self._offset.shape[1])
        other._targets = self.loss.targets(labels, shape)
        other._offset = self._offset if offset is None else _offset(offset, shape)
        return other

    @property
    def largest_weight(self) -> float:
        """The least weight for which zero is optimal: ``max_g ||v_g||_o / w_g`` at ``u = 0``.

        Raises:
            InputError: for `Ridge` and `NormBall`, which never give exactly zero.
        """
        if not self.penalty.selects:
            raise InputError(
                f"{type(self.penalty).__name__} has no weight from which on the solution is zero; "
                "GroupLasso and NuclearNorm have"
            )
        a = self.loss.gradient(self._offset, self._targets)
        return self.penalty.gauge(self._pulled(a))

    def grid(self, count: int, smallest: float = 0.01) -> list[float]:
        """Weights from `largest_weight` down to `smallest` times it, equidistant in logarithm."""
        return [self.largest_weight * float(r) for r in np.geomspace(1.0, smallest, count)]

    def solve(self, weight: float) -> ConvexSolution:
        """The solution for one weight.

        Raises:
            InputError: for a weight that is not positive.
        """
        return self._solve(weight, {})

    def path(self, weights: Sequence[float]) -> list[ConvexSolution]:
        """The solutions for several weights, in their order.

        They are solved from the sparsest on, each with the working set of the one before and
        without compiling the program again.
        """
        working: Working = {}
        order = sorted(range(len(weights)), key=lambda i: weights[i], reverse=self.penalty.weighs)
        solutions = {i: self._solve(weights[i], working) for i in order}
        return [solutions[i] for i in range(len(weights))]

    def bound(self, dual: Tensor, weight: float) -> float:
        """``D(a)``, a lower bound of the objective for every ``a``; ``-inf`` outside the domain."""
        a = as_array(dual)
        if a.shape != self._offset.shape:
            raise InputError(f"the dual has shape {a.shape}; expected {self._offset.shape}")
        return self._bound(a, self._pulled(a), weight)

    def program(self, weight: float) -> Program:
        """The compiled program that `solve` ends with, for inspection."""
        working: Working = {}
        self._solve(weight, working)
        return self._program(working)

    def _solve(self, weight: float, working: Working) -> ConvexSolution:
        self._check_weight(weight)
        begun = time.perf_counter()
        u, suggested = [np.zeros(block.features.shape) for block in self._blocks], None
        solver, rounds = "none", 0
        if not self.penalty.selects:
            self.penalty.grow(u, u, weight, working)
        while True:
            if working:
                program, solver = self._program(working), "failed"
                found = program.solve(weight, self._offset, self._targets)
                rounds += 1
                if found is not None:
                    solver = program.used
                    u = self.penalty.feasible(self._expanded(program, found), weight)
                    suggested = program.multipliers()
            point = self._certified(u, weight, suggested)
            if solver == "failed" or point.gap <= self._allowed(point.objective):
                break
            if rounds >= _MAX_ROUNDS:
                break
            if not self.penalty.grow(point.pulled, point.u, weight, working):
                break
        point = self._cleaned(point, weight, suggested)
        return self._solution(point, weight, rounds, solver, time.perf_counter() - begun)

    def _certified(
        self, u: list[np.ndarray], weight: float, suggested: np.ndarray | None
    ) -> _Point:
        """The objective of ``u`` and the better of two bounds.

        They come from the gradient at ``u`` and from the solver's multipliers, which satisfy the
        constraints on ``v`` more closely where the solver is of limited accuracy.
        """
        y = sum(b.features.apply(c) for b, c in zip(self._blocks, u, strict=True))
        z = self._offset + y @ self._contrasts.T
        loss = self.loss.value(z, self._targets)
        objective = loss + self.penalty.value(u, weight)
        gradient = self.loss.gradient(z, self._targets)
        points = []
        for a in (gradient, suggested):
            if a is None or not np.isfinite(a).all():
                continue
            a = self.loss.nearest(a, self._targets)
            pulled = self._pulled(a)
            gauge = self.penalty.gauge(pulled)
            shrink = 1.0 if gauge <= weight else weight / gauge
            a, v = shrink * a, [shrink * block for block in pulled]
            points.append(_Point(u, z, loss, objective, a, pulled, v, self._bound(a, v, weight)))
        return max(points, key=lambda point: point.bound)

    def _cleaned(self, point: _Point, weight: float, suggested: np.ndarray | None) -> _Point:
        """Set to zero what the gap proves to be zero, and certify again."""
        if not self.penalty.selects or not math.isfinite(point.gap):
            return point
        bounds = self._rank_bounds(point, weight)
        cleaned = self._certified(self.penalty.truncated(point.u, bounds), weight, suggested)
        return cleaned if cleaned.gap <= max(point.gap, self._allowed(point.objective)) else point

    def _rank_bounds(self, point: _Point, weight: float) -> list[int]:
        gap = max(point.gap, 0.0) + _ROUNDING * max(1.0, abs(point.objective))
        radius = math.sqrt(2 * len(point.z) * self.loss.smoothness * gap)
        slack = [radius * block.operator_norm / len(point.z) for block in self._blocks]
        return self.penalty.rank_bounds(point.v, slack, weight)

    def _solution(
        self, point: _Point, weight: float, rounds: int, solver: str, seconds: float
    ) -> ConvexSolution:
        def lift() -> tuple[Tensor, ...]:
            controls = [torch.zeros(shape, dtype=torch.float64) for shape in self.shapes]
            for block, u in zip(self._blocks, point.u, strict=True):
                if u.any():
                    for g, control in zip(block.groups, block.lift(u), strict=True):
                        controls[g] = torch.from_numpy(control.reshape(self.shapes[g]))
            return tuple(controls)

        bounds = self._rank_bounds(point, weight) if math.isfinite(point.gap) else None
        if self.penalty.joint:
            blocks = [b.numpy() for b in lift()]
            bounds = [int(np.prod(shape) > 0) for shape in self.shapes]
            ranks = Penalty.ranks(self.penalty, blocks, 0.0)
        else:
            blocks = point.u
            largest = max(np.linalg.norm(b, 2) if b.size else 0.0 for b in blocks)
            ranks = self.penalty.ranks(blocks, ACTIVE * float(largest))
            bounds = bounds or [min(shape) for shape in self.shapes]
        good = point.gap <= self._allowed(point.objective)
        return ConvexSolution(
            weight=weight,
            objective=point.objective,
            loss=point.loss,
            bound=point.bound,
            gap=point.gap,
            status=ConvexStatus.OPTIMAL if good else ConvexStatus.INACCURATE,
            names=self.names,
            dual=torch.from_numpy(point.a),
            logits=torch.from_numpy(point.z),
            norms=tuple(float(np.linalg.norm(b)) for b in blocks),
            ranks=tuple(ranks),
            rank_bounds=tuple(bounds),
            rounds=rounds,
            solver=solver,
            seconds=seconds,
            _lift=lift,
        )

    def _allowed(self, objective: float) -> float:
        return self.tolerance * max(1.0, abs(objective))

    def _bound(self, a: np.ndarray, v: Sequence[np.ndarray], weight: float) -> float:
        conjugates = self.loss.conjugate(a, self._targets) + self.penalty.conjugate(v, weight)
        return float((a * self._offset).sum() / len(a) - conjugates)

    def _pulled(self, a: np.ndarray) -> list[np.ndarray]:
        """``v = -1/N sum_i G_i'a_i``, block by block."""
        contrasted = -(a @ self._contrasts) / len(a)
        return [block.features.adjoint(contrasted) for block in self._blocks]

    def _program(self, working: Working) -> Program:
        whole = all(bases is None for bases in working.values())
        key = tuple(sorted(working)) if whole else None
        if key is not None and key in self._programs:
            return self._programs[key]
        restricted = {
            g: self._restricted(self._blocks[g].features, working[g]) for g in sorted(working)
        }
        name, quadratic = self._solver
        program = Program(
            restricted,
            len(self._offset),
            self._contrasts,
            self.loss,
            self.penalty,
            solver=name,
            quadratic=quadratic,
        )
        if key is not None:
            self._programs[key] = program
        return program

    def _restricted(
        self, features: Features, bases: tuple[np.ndarray, np.ndarray] | None
    ) -> Restricted:
        if bases is not None:
            features = features.restrict(*bases)
        shape = features.shape if self.penalty.spectral else (features.size,)
        return Restricted(as_matrix(features), shape, bases)

    def _expanded(self, program: Program, found: dict[int, np.ndarray]) -> list[np.ndarray]:
        u = [np.zeros(block.features.shape) for block in self._blocks]
        for g, value in found.items():
            bases = program.restricted[g].bases
            value = value if bases is None else bases[0] @ value @ bases[1].T
            u[g] = value.reshape(u[g].shape)
        return u

    def _check_weight(self, weight: float) -> None:
        free = isinstance(self.penalty, BoxedRidge) and self.penalty.bounded and weight == 0
        if not (free or 0 < weight < math.inf):
            raise InputError(
                f"the weight is {weight}; expected a positive number (0 only with a box that "
                "bounds every control on both sides): without a regulariser a separable set of "
                "examples has no minimum"
            )

    def _boxed(self, box: Box) -> BoxedRidge:
        if type(self.penalty) is not Ridge:
            raise InputError(
                f"a box goes with Ridge, not with {type(self.penalty).__name__}; the weight of "
                "Ridge may be 0 where the box is finite"
            )
        like = [torch.zeros(shape, dtype=torch.float64) for shape in self.shapes]
        bounds = [box.bounds(t, u) for t, u in enumerate(like)]
        low, high = (np.concatenate([as_array(b[i]).reshape(-1) for b in bounds]) for i in (0, 1))
        return BoxedRidge(low, high)


_MAX_ROUNDS = 40
# Relative rounding error of the objective and of its bound.
_ROUNDING = 1e-14


@dataclass(frozen=True, eq=False)
class _Point:
    """Controls, and the feasible dual point ``a`` that they give; ``v`` belongs to it."""

    u: list[np.ndarray]
    z: np.ndarray
    loss: float
    objective: float
    a: np.ndarray
    pulled: list[np.ndarray]
    v: list[np.ndarray]
    bound: float

    @property
    def gap(self) -> float:
        return self.objective - self.bound


def _offset(offset: Tensor | None, shape: tuple[int, int]) -> np.ndarray:
    if offset is None:
        return np.zeros(shape)
    array = as_array(offset)
    if array.shape != shape or not np.isfinite(array).all():
        raise InputError(
            f"the offset has shape {array.shape}; expected finite logits of shape {shape}, "
            "(examples, logits)"
        )
    return array
