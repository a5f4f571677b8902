"""Maxima, saddles and symmetric starts are no minima, for solvers that see curvature."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltacontrol.theory import (
    Box,
    ControlProblem,
    HessianCurvature,
    LinearDynamics,
    QuadraticCost,
    solve,
)
from deltacontrol.theory.control.problem import Cost
from deltacontrol.theory.linear.minimum import falling_curvature
from deltacontrol.theory.solvers import Status, registry, solving

F64 = torch.float64
SECOND = ("newton-cg", "gauss-newton", "ilqr", "ddp")


def eye(n: int, scale: float = 1.0) -> Tensor:
    return scale * torch.eye(n, dtype=F64)


class Saddle(Cost):
    """``x_0^2 - x_1^2 + x_1^4/4``: a saddle at 0, minima -1 at ``x_1 = +-sqrt 2``."""

    def terminal(self, x: Tensor) -> Tensor:
        """As above."""
        return (x[..., 0] ** 2 - x[..., 1] ** 2 + 0.25 * x[..., 1] ** 4).mean()


class Wells(Cost):
    """``(x^2 - 1)^2``: a maximum at the symmetric 0, minima 0 at +-1."""

    def terminal(self, x: Tensor) -> Tensor:
        """As above."""
        return ((x**2 - 1) ** 2).mean()


def problem(cost: Cost, *start: float) -> ControlProblem:
    n = len(start)
    return ControlProblem(
        LinearDynamics([eye(n)] * 2, [eye(n)] * 2), cost, torch.tensor(start, dtype=F64)
    )


def falling(n: int = 2, R: float = -5.0) -> ControlProblem:
    """``R < 0`` and no state cost before the end: ``J`` has a maximum at 0 and no minimum."""
    return problem(QuadraticCost([eye(n, 0.0)] * 2, [eye(n, R)] * 2, eye(n)), *[0.0] * n)


CASES = {
    "maximum": (falling(), -5.0),
    "saddle": (problem(Saddle(), 0.0, 0.0), -4.0),  # two equal controls add up: twice -2
    # From here x_1 stays 0 by symmetry while x_0 falls to 0.
    "symmetric": (problem(Saddle(), 1.0, 0.0), -4.0),
    "wells": (problem(Wells(), 0.0), -8.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", SECOND)
def test_a_stationary_point_that_is_no_minimum_is_told(name: str, case: str) -> None:
    given, curvature = CASES[case]
    found = solve(given, registry.parse(name), max_steps=50)
    assert found.status in (Status.STATIONARY, Status.UNBOUNDED), found
    if found.status is Status.STATIONARY:
        assert f"J has the curvature {curvature:.3g} along" in found.message
        assert found.residual.norm < 1e-5


def test_riccati_sees_the_maximum() -> None:
    assert solve(falling(), registry.parse("riccati")).status in ("stationary", "unbounded")


@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize(
    ("cost", "start", "minimum"),
    [(Saddle(), (0.5, 0.1), -1.0), (Wells(), (0.2,), 0.0), (Saddle(), (0.0, -0.3), -1.0)],
)
def test_beside_it_the_minimum_is_found(name: str, cost: Cost, start, minimum: float) -> None:
    found = solve(problem(cost, *start), registry.parse(name), max_steps=100)
    assert found.status == "converged" and abs(found.objective - minimum) < 1e-6


def test_a_flat_direction_is_no_fall() -> None:
    given = falling(R=0.0)  # the second control is free where the first is
    for name in SECOND[:2]:
        assert solve(given, registry.parse(name)).status == "converged"


@pytest.mark.parametrize("size", [1, 3, 40])
def test_the_curvature_is_that_of_the_hessian(size: int) -> None:
    given = falling(size)
    u = given.zero_controls(dtype=F64)
    assert abs(falling_curvature(HessianCurvature(given, u)) + 5.0) < 1e-9
    assert falling_curvature(HessianCurvature(falling(size, 5.0), u)) is None


@pytest.mark.parametrize("name", ["ilqr", "ddp"])
def test_in_a_box_the_controls_at_no_bound_count(name: str) -> None:
    """``-5 u^2`` in all controls: 0 is a maximum, a corner of the box is a minimum."""
    solver, inner = registry.parse(name), falling()
    given = ControlProblem(inner.dynamics, inner.cost, inner.x0, box=Box(-1.0, 1.0))
    found = solve(given, solver, max_steps=50)
    assert found.status is Status.STATIONARY and "curvature -5 along" in found.message
    corner = tuple(torch.ones(2, dtype=F64) for _ in range(2))
    assert solve(given, solver, corner).status is Status.CONVERGED
    half = (torch.tensor([1.0, 0.0], dtype=F64), corner[1])
    found = solve(given, solver, half, max_steps=0, tol=1.0)
    assert found.status is Status.STATIONARY, "one control lies between its bounds"


@pytest.mark.parametrize("name", ["ilqr", "ddp"])
def test_a_model_that_was_factorised_needs_no_search(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its curvatures are positive: a Krylov space of the Hessian can find no other."""
    looked: list[Tensor] = []

    def look(curvature: HessianCurvature, free: Tensor | None) -> float | None:
        dense = curvature @ torch.eye(curvature.shape[0], dtype=F64)
        looked.append(torch.linalg.eigvalsh(dense))
        return falling_curvature(curvature, free)

    monkeypatch.setattr(solving, "falling_curvature", look)
    strict = ControlProblem(
        LinearDynamics([eye(2)] * 2, [eye(2)] * 2),
        QuadraticCost([eye(2, 0.0)] * 2, [eye(2, 0.1)] * 2, eye(2)),
        torch.ones(2, dtype=F64),
    )
    assert solve(strict, registry.parse(name)).status == "converged" and not looked
    for case in ("saddle", "wells"):
        solve(CASES[case][0], registry.parse(name))
    assert len(looked) == 2 and all(float(values[0]) < 0 for values in looked)
