"""How tests run iLQR and DDP."""

from __future__ import annotations

import pytest

from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.solvers import Solver, solve
from deltacontrol.theory.solvers.ilqr import DDP, ILQR

BOTH = pytest.mark.parametrize("solver", [ILQR(), DDP()], ids=["ilqr", "ddp"])


def run(problem: ControlProblem, solver: Solver, tol: float = 1e-8, max_steps: int = 30):
    return solve(problem, solver, problem.zero_controls(), max_steps=max_steps, tol=tol)
