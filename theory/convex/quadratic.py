"""The linear-quadratic problem, with a box, as one dense quadratic program and its certificate.

Eliminating the states of `LinearDynamics` from a `QuadraticCost` leaves, for the controls stacked
in ``w``, ``J(w) = c + g'w + 1/2 w'Hw`` on ``low <= w <= high``.

*Certificate.* For multipliers ``nu = nu_low - nu_high`` of the bounds, Lagrange's dual function is

    D(nu) = c + low'nu_+ - high'nu_-  +  min_w { (g - nu)'w + 1/2 w'Hw }.

At a point ``w`` of the box with gradient ``d = g + Hw`` take ``nu_j = d_j`` wherever the bound that
its sign needs is finite (``low`` for ``d_j > 0``), else 0. The inner function then has the gradient
``e = d - nu`` at ``w``, so that its minimum is ``1/2 e'H^+e`` below its value there (minus infinity
where ``e`` is not in the range of ``H``). Hence

    J(w) - D(nu) = sum_j nu_j+ (w_j - low_j) + nu_j- (high_j - w_j)  +  1/2 e'H^+e  >=  0,

which needs no solver's multipliers: zero exactly if ``w`` satisfies the optimality conditions.

Where ``H`` has a negative eigenvalue, or ``g`` a part outside the range of ``H``, there is no
minimum without bounds.

Source: Boyd & Vandenberghe, *Convex Optimization*, 2004, sections 5.1.1 and 5.5.1; Rawlings, Mayne
& Diehl, *Model Predictive Control*, 2017, chapter 8 (condensing).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.control.systems import LinearDynamics
from deltacontrol.theory.convex.program import run_solvers, solver_order
from deltacontrol.theory.convex.solution import ConvexStatus
from deltacontrol.theory.errors import InputError

__all__ = ["QuadraticSolution", "condensed", "solve_convex"]

# Eigenvalues of H count as zero below this share of the largest.
_ZERO = 1e-12
_MAX_UNKNOWNS = 4000


@dataclass(frozen=True, eq=False)
class QuadraticSolution:
    """Optimal controls and their proof.

    Attributes:
        controls: ``u_0..u_{L-1}``; zero where the problem is unbounded.
        multipliers: ``nu_t`` of the bounds, positive at ``low`` and negative at ``high``; zero
            without a box.
        objective: ``J``, computed from the controls; ``-inf`` where the problem is unbounded.
        bound: ``D(nu)``.
        gap: ``J - D``; NaN where the problem is unbounded.
        status: optimal if the gap is at most the tolerance times ``max(1, |J|)``.
        message: what happened and, unless optimal, what to try.
        solver: the solver that was used.
        seconds: the time of all.
    """

    controls: Controls
    multipliers: Controls
    objective: float
    bound: float
    gap: float
    status: ConvexStatus
    message: str
    solver: str
    seconds: float


@typed
def solve_convex(
    problem: ControlProblem,
    *,
    per_example: bool = False,
    tolerance: float = 1e-9,
    solver: str = "auto",
) -> QuadraticSolution:
    """Solve a linear-quadratic problem, with or without a box, by a dense quadratic program.

    The cost of ``n`` stacked controls is that of ``H``, ``n^2`` numbers and ``n^3`` operations.

    Args:
        problem: `LinearDynamics` with a `QuadraticCost`.
        per_example: controls ``(batch, m_t)`` instead of shared ones.
        tolerance: the largest gap, relative to ``max(1, |J|)``, that counts as optimal.
        solver: "auto" (Clarabel, then OSQP), "clarabel", "osqp" or "scs".

    Raises:
        InputError: for another kind of problem, more than 4000 unknowns, a tolerance that is not
            positive, and a problem with bounds that is not convex.

    Example:
        ``J(u) = 1/2 (1 + u)^2 + 1/2 u^2`` on ``u >= -1/4``:

        >>> from deltacontrol.theory.control.problem import Box
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> cost = QuadraticCost.constant(1, Q=0 * one, R=one, Qf=one)
        >>> problem = ControlProblem(
        ...     LinearDynamics.constant(1, one, one), cost, one[0], Box(low=-0.25))
        >>> solution = solve_convex(problem)
        >>> solution.status.value, round(float(solution.controls[0]), 6)
        ('optimal', -0.25)
        >>> round(float(solution.multipliers[0]), 6)
        0.5
    """
    begun = time.perf_counter()
    solvers = solver_order(solver, quadratic=True)
    if not tolerance > 0:
        raise InputError(f"the tolerance is {tolerance}; expected a positive gap, such as 1e-9")
    if not isinstance(problem.dynamics, LinearDynamics) or not isinstance(
        problem.cost, QuadraticCost
    ):
        raise InputError(
            f"solve_convex takes LinearDynamics with a QuadraticCost, not "
            f"{type(problem.dynamics).__name__} with {type(problem.cost).__name__}; linearise "
            "first (ConvexTuning), or take an iterative solver"
        )
    like = problem.zero_controls(per_example=per_example, dtype=torch.float64)
    if problem.box is not None:
        problem.box.check(like)
    program = _condense(problem, like)
    if program.unbounded:
        if problem.box is not None and program.curvature < 0:
            raise InputError(
                f"the objective has curvature {program.curvature:.3g} along some controls: it is "
                "not convex, and a box does not make it so; raise R, or take ILQR (a local minimum)"
            )
        if problem.box is None:
            why = (
                f"curvature {program.curvature:.3g} along some controls"
                if program.curvature < 0
                else "a nonzero slope along controls without curvature"
            )
            return _unbounded(like, f"the objective has {why}", time.perf_counter() - begun)
    w, used = program.solve(solvers)
    if w is None and used == "unbounded":
        reason = "the objective falls without bound inside the box"
        return _unbounded(like, reason, time.perf_counter() - begun)
    if w is None:
        w = np.clip(np.zeros(len(program.g)), program.low, program.high)
    objective, bound, nu = program.certificate(w)
    gap = objective - bound
    good = gap <= tolerance * max(1.0, abs(objective))
    return QuadraticSolution(
        controls=_split(w, like),
        multipliers=_split(nu, like),
        objective=objective,
        bound=bound,
        gap=gap,
        status=ConvexStatus.OPTIMAL if good else ConvexStatus.INACCURATE,
        message=f"duality gap {gap:.2e}"
        + ("" if good else f" > {tolerance:.0e}; rescale the cost, or try another solver"),
        solver=used,
        seconds=time.perf_counter() - begun,
    )


@dataclass(frozen=True, eq=False)
class _Quadratic:
    """``c + g'w + 1/2 w'Hw`` on ``low <= w <= high``, with ``H = V diag(values) V'``."""

    c: float
    g: np.ndarray
    values: np.ndarray
    vectors: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def curvature(self) -> float:
        """The least eigenvalue of ``H``; 0 where it is rounding."""
        least = float(self.values.min(initial=0.0))
        return least if least < -_ZERO * self._scale else 0.0

    @property
    def _scale(self) -> float:
        return max(float(np.abs(self.values).max(initial=0.0)), np.finfo(float).tiny)

    @property
    def _flat(self) -> np.ndarray:
        """Which eigenvectors have no curvature."""
        return self.values <= _ZERO * self._scale

    @property
    def unbounded(self) -> bool:
        """Whether there is no minimum without bounds."""
        slope = np.linalg.norm(self.vectors[:, self._flat].T @ self.g)
        return self.curvature < 0 or bool(slope > 1e-10 * max(np.linalg.norm(self.g), 1e-300))

    def solve(self, solvers: tuple[str, ...]) -> tuple[np.ndarray | None, str]:
        """The minimiser and the solver, or None and what went wrong."""
        import cvxpy as cp

        if not len(self.g):
            return self.g, "none"
        w = cp.Variable(len(self.g))
        root = np.sqrt(np.maximum(self.values, 0.0))[:, None] * self.vectors.T
        below, above = np.flatnonzero(np.isfinite(self.low)), np.flatnonzero(np.isfinite(self.high))
        constraints: list[Any] = [w[below] >= self.low[below]] if below.size else []
        constraints += [w[above] <= self.high[above]] if above.size else []
        cost = 0.5 * cp.sum_squares(root @ w) + self.g @ w
        program = cp.Problem(cp.Minimize(cost), constraints)
        used = run_solvers(program, solvers)
        if used is None:
            return None, "unbounded" if "unbounded" in str(program.status) else "failed"
        return np.clip(np.asarray(w.value), self.low, self.high), used

    def certificate(self, w: np.ndarray) -> tuple[float, float, np.ndarray]:
        """``J(w)``, ``D(nu)`` and ``nu``."""
        curved = self.values * (self.vectors.T @ w)
        d = self.g + self.vectors @ curved
        bounded = np.where(d > 0, np.isfinite(self.low), np.isfinite(self.high))
        nu = np.where(bounded, d, 0.0)
        room = np.where(nu > 0, w - self.low, self.high - w)
        slack = float((np.abs(nu) * np.where(nu != 0, room, 0.0)).sum())
        e = self.vectors.T @ (d - nu)
        lost = np.abs(e[self._flat]).max(initial=0.0)
        rounding = 1e-10 * max(float(np.linalg.norm(self.g)), self._scale)
        curvature = self.values[~self._flat]
        slack += 0.5 * float((np.square(e[~self._flat]) / curvature).sum())
        if lost > rounding:
            slack = math.inf
        objective = self.c + float(self.g @ w + 0.5 * curved @ (self.vectors.T @ w))
        return objective, objective - slack, nu


def condensed(problem: ControlProblem, at: Controls) -> tuple[float, Tensor, Tensor]:
    """A quadratic ``J``, its gradient ``(n,)`` and its Hessian ``(n, n)`` in the flat controls.

    Raises:
        InputError: for more than 4000 unknowns.
    """
    sizes = [u.numel() for u in at]
    if sum(sizes) > _MAX_UNKNOWNS:
        raise InputError(
            f"the problem has {sum(sizes)} controls in all, and a dense program takes at most "
            f"{_MAX_UNKNOWNS}; take the Riccati solver, or ILQR with a box"
        )
    point = torch.cat([u.reshape(-1) for u in at or (torch.zeros(0, dtype=torch.float64),)])

    def objective(z: Tensor) -> Tensor:
        pieces = z.split(sizes) if sizes else ()
        return problem.objective(tuple(p.reshape(u.shape) for p, u in zip(pieces, at, strict=True)))

    if point.numel():
        # The Hessian of a quadratic, one column for each unknown: exact up to rounding.
        g = torch.func.grad(objective)(point)
        H = torch.func.vmap(
            lambda e: torch.func.jvp(torch.func.grad(objective), (point,), (e,))[1]
        )(torch.eye(len(point), dtype=point.dtype))
    else:
        g, H = point, point.reshape(0, 0)
    return float(objective(point)), g, 0.5 * (H + H.mT)


def _condense(problem: ControlProblem, like: Controls) -> _Quadratic:
    c, g, H = condensed(problem, like)
    values, vectors = np.linalg.eigh(H.numpy())
    if problem.box is None:
        low, high = torch.full_like(g, -math.inf), torch.full_like(g, math.inf)
    else:
        bounds = [problem.box.bounds(t, u) for t, u in enumerate(like or (g,))]
        low, high = (torch.cat([b[i].reshape(-1) for b in bounds]) for i in (0, 1))
    return _Quadratic(c, g.numpy(), values, vectors, low.numpy(), high.numpy())


def _split(w: np.ndarray, like: Controls) -> Controls:
    parts = torch.from_numpy(np.array(w)).split([u.numel() for u in like]) if like else ()
    return tuple(p.reshape(u.shape) for p, u in zip(parts, like, strict=True))


def _unbounded(like: Controls, reason: str, seconds: float) -> QuadraticSolution:
    return QuadraticSolution(
        controls=like,
        multipliers=like,
        objective=-math.inf,
        bound=-math.inf,
        gap=math.nan,
        status=ConvexStatus.UNBOUNDED,
        message=f"{reason}: no minimum exists; raise R (a weight decay), or bound the controls",
        solver="none",
        seconds=seconds,
    )
