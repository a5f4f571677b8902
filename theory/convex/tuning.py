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

*The certificate.* Whatever a solver returns, feasible dual points are made from it, and the gap
``P(u) - D(a)`` is reported (`deltacontrol.theory.convex.certificate`): a proof, never the solver's
word. Groups and singular directions that it proves to be zero are set to zero.

*The largest weight.* ``u = 0`` is optimal exactly if ``a = grad l(z)`` has ``R*(v) = 0``, that is
from ``lambda = max_g ||v_g||_o / w_g`` on.

Source: Borwein & Lewis, *Convex Analysis and Nonlinear Optimization*, 2006, theorem 3.3.5.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import Box
from deltacontrol.theory.convex.blocks import as_matrix, blocks, check_memory, named_groups
from deltacontrol.theory.convex.certificate import Certificate, CertifiedPoint
from deltacontrol.theory.convex.features import Features, as_array, contrasts
from deltacontrol.theory.convex.losses import named
from deltacontrol.theory.convex.penalties import BoxedRidge, Penalty, Ridge, Working
from deltacontrol.theory.convex.program import Program, Restricted
from deltacontrol.theory.convex.solution import ACTIVE, ConvexSolution, ConvexStatus
from deltacontrol.theory.errors import InputError

__all__ = ["ConvexTuning"]


@typed
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
        self.shapes = tuple(group.control_shape for group in found)
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
        return self.penalty.gauge(self._certificate.pulled(a))

    @typed
    def grid(self, count: int, smallest: float = 0.01) -> list[float]:
        """Weights from `largest_weight` down to `smallest` times it, equidistant in logarithm."""
        return [self.largest_weight * float(r) for r in np.geomspace(1.0, smallest, count)]

    @typed
    def solve(self, weight: float) -> ConvexSolution:
        """The solution for one weight.

        Raises:
            InputError: for a weight that is not positive.
        """
        return self._solve(weight, {})

    @typed
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
        certificate = self._certificate
        return certificate.bound(a, certificate.pulled(a), weight)

    def program(self, weight: float) -> Program:
        """The compiled program that `solve` ends with, for inspection."""
        working: Working = {}
        self._solve(weight, working)
        return self._program(working)

    def _solve(self, weight: float, working: Working) -> ConvexSolution:
        self._check_weight(weight)
        begun = time.perf_counter()
        u, suggested = self._zeros(), None
        certificate = self._certificate
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
            point = certificate.point(u, weight, suggested)
            if solver == "failed" or point.gap <= self._allowed(point.objective):
                break
            if rounds >= _MAX_ROUNDS:
                break
            if not self.penalty.grow(point.pulled, point.u, weight, working):
                break
        point = self._cleaned(point, weight, suggested)
        return self._solution(point, weight, rounds, solver, time.perf_counter() - begun)

    @property
    def _certificate(self) -> Certificate:
        return Certificate(
            self._blocks, self._contrasts, self.loss, self.penalty, self._offset, self._targets
        )

    def _cleaned(
        self, point: CertifiedPoint, weight: float, suggested: np.ndarray | None
    ) -> CertifiedPoint:
        """Set to zero what the gap proves to be zero, and certify again."""
        if not self.penalty.selects or not math.isfinite(point.gap):
            return point
        certificate = self._certificate
        bounds = certificate.rank_bounds(point, weight)
        cleaned = certificate.point(self.penalty.truncated(point.u, bounds), weight, suggested)
        return cleaned if cleaned.gap <= max(point.gap, self._allowed(point.objective)) else point

    def _solution(
        self, point: CertifiedPoint, weight: float, rounds: int, solver: str, seconds: float
    ) -> ConvexSolution:
        def lift() -> tuple[Tensor, ...]:
            controls = [torch.zeros(shape, dtype=torch.float64) for shape in self.shapes]
            for block, u in zip(self._blocks, point.u, strict=True):
                if u.any():
                    for g, control in zip(block.groups, block.expand(u), strict=True):
                        controls[g] = torch.from_numpy(control.reshape(self.shapes[g]))
            return tuple(controls)

        bounds = None
        if math.isfinite(point.gap):
            bounds = self._certificate.rank_bounds(point, weight)
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
        shape = features.control_shape if self.penalty.spectral else (features.shape[1],)
        return Restricted(as_matrix(features), shape, bases)

    def _expanded(self, program: Program, found: dict[int, np.ndarray]) -> list[np.ndarray]:
        u = self._zeros()
        for g, value in found.items():
            bases = program.restricted[g].bases
            value = value if bases is None else bases[0] @ value @ bases[1].T
            u[g] = value.reshape(u[g].shape)
        return u

    def _zeros(self) -> list[np.ndarray]:
        return [np.zeros(block.features.control_shape) for block in self._blocks]

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
