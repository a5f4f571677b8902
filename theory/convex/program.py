"""The cvxpy program of a working set, compiled once for all weights, labels and offsets."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltacontrol.theory.convex.losses import Loss
from deltacontrol.theory.convex.penalties import Penalty
from deltacontrol.theory.errors import InputError, unknown

__all__ = ["Program", "Restricted", "run_solvers", "solver_order"]

_TIGHT: dict[str, dict[str, Any]] = {
    "CLARABEL": {
        "tol_gap_abs": 1e-10,
        "tol_gap_rel": 1e-10,
        "tol_feas": 1e-10,
        "max_iter": 200,
    },
    "OSQP": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 200_000, "polishing": True},
    "SCS": {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 50_000},
}


@dataclass(frozen=True, eq=False)
class Restricted:
    """The features of one block on the working set.

    Attributes:
        matrix: ``(N J, size)``, the contrasts of the logits in the variable.
        shape: of the variable.
        bases: ``(U, V)`` of ``W = U A V'``, or None where the variable is the block.
    """

    matrix: np.ndarray
    shape: tuple[int, ...]
    bases: tuple[np.ndarray, np.ndarray] | None


class Program:
    """``min N L(offset + C y) + N R(u)`` subject to ``y = sum_g B_g u_g``.

    The contrasts ``y`` of the logits are variables of their own, so that the weight, the offset and
    the labels enter as parameters in the disciplined sense: a path compiles once.

    Source: Agrawal, Amos, Barratt, Boyd, Diamond & Kolter, NeurIPS 2019, section 4.1 (DPP).

    Attributes:
        problem: the cvxpy problem.
        restricted: the blocks of the working set.
        used: the solver that gave the last solution.
    """

    def __init__(
        self,
        restricted: Mapping[int, Restricted],
        num_examples: int,
        contrasts: np.ndarray,
        loss: Loss,
        penalty: Penalty,
        *,
        solver: str,
        quadratic: bool,
    ) -> None:
        import cvxpy as cp

        num_logits, num_contrasts = contrasts.shape
        self.restricted = dict(restricted)
        self.used = "none"
        self._contrasts = contrasts
        self._solvers = solver_order(solver, quadratic)
        self._weight = cp.Parameter(nonneg=True)
        self._offset = cp.Parameter((num_examples, num_logits))
        self._targets = cp.Parameter((num_examples, num_contrasts))
        y = cp.Variable((num_examples, num_contrasts))
        self._variables = {g: cp.Variable(r.shape) for g, r in self.restricted.items()}
        terms = [
            self.restricted[g].matrix @ cp.vec(u, order="C") for g, u in self._variables.items()
        ]
        cost, constraints = penalty.expression(self._variables, self._weight, num_examples)
        logits = self._offset + y @ contrasts.T
        objective = loss.expression(logits) - cp.sum(cp.multiply(self._targets, y)) + cost
        self.problem = cp.Problem(
            cp.Minimize(objective), [cp.vec(y, order="C") == sum(terms), *constraints]
        )

    def solve(
        self, weight: float, offset: np.ndarray, targets: np.ndarray
    ) -> dict[int, np.ndarray] | None:
        """The blocks' controls, or None where every solver failed."""
        self._weight.value = weight
        self._offset.value = offset
        self._targets.value = targets @ self._contrasts
        self.used = run_solvers(self.problem, self._solvers) or "none"
        if self.used == "none":
            return None
        return {g: np.asarray(u.value) for g, u in self._variables.items()}

    def multipliers(self) -> np.ndarray | None:
        """The solver's estimate of ``a``: minus its multipliers of the equation of ``y``."""
        value = self.problem.constraints[0].dual_value
        if value is None:
            return None
        return -np.asarray(value).reshape(self._targets.shape) @ self._contrasts.T


def run_solvers(problem: Any, solvers: tuple[str, ...]) -> str | None:
    """Solve by the first solver that returns finite values; its name, or None.

    The accuracy that a solver claims does not matter here: the caller computes a certificate.

    Raises:
        InputError: the numbers overflow.
    """
    import cvxpy as cp

    for name in solvers:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "may be inaccurate": the certificate decides
            try:
                problem.solve(solver=name, **_TIGHT[name])
            except cp.SolverError:
                continue
            except ValueError as error:  # of numbers whose products leave the range of floats
                raise InputError(
                    f"the program's numbers are too large or too small for a solver ({error}); "
                    "choose features, targets and a weight of a common scale"
                ) from error
        values = [v.value for v in problem.variables()]
        if all(v is not None and np.isfinite(v).all() for v in values):
            return name.lower()
    return None


def solver_order(solver: str, quadratic: bool) -> tuple[str, ...]:
    """Which solvers to try: an interior-point method first, for its accuracy.

    Raises:
        InputError: for an unknown name.
    """
    if solver == "auto":
        return ("CLARABEL", "OSQP" if quadratic else "SCS")
    if solver.upper() not in _TIGHT:
        raise unknown("solver", solver, ["auto", *(name.lower() for name in _TIGHT)])
    return (solver.upper(),)
