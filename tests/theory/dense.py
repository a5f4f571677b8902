"""Dense references: flat controls, the Hessian of the objective, the KKT system."""

from __future__ import annotations

import cvxpy
import numpy as np
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import QuadraticCost
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.control.systems import LinearDynamics


def flat(controls: Controls) -> Tensor:
    return torch.cat([u.detach().reshape(-1) for u in controls])


def unflatten(z: Tensor, like: Controls) -> Controls:
    parts = z.split([u.numel() for u in like])
    return tuple(part.reshape(u.shape) for part, u in zip(parts, like, strict=True))


def hessian(problem: ControlProblem, at: Controls) -> Tensor:
    """The Hessian of ``J`` in the concatenated controls."""
    return torch.func.hessian(lambda z: problem.objective(unflatten(z, at)))(flat(at))


def stacked(problem: ControlProblem, per_example: bool) -> dict[str, list[np.ndarray]]:
    """The matrices of one large system whose state holds the whole batch."""
    dynamics, cost = problem.dynamics, problem.cost
    assert isinstance(dynamics, LinearDynamics) and isinstance(cost, QuadraticCost)
    batch = problem.x0.shape[0] if problem.x0.ndim == 2 else 1
    eye, ones = np.eye(batch), np.ones((batch, 1))
    spread = eye if per_example else ones
    weight = 1 / batch if per_example else 1.0
    steps = range(dynamics.horizon)

    def vector(terms: object, t: int, copies: int) -> np.ndarray:
        return np.tile(terms[t].numpy(), copies)

    copies = batch if per_example else 1
    return {
        "A": [np.kron(eye, dynamics.A[t].numpy()) for t in steps],
        "B": [np.kron(spread, dynamics.B[t].numpy()) for t in steps],
        "c": [
            np.zeros(batch * len(dynamics.A[t]))
            if dynamics.c is None
            else vector(dynamics.c, t, batch)
            for t in steps
        ],
        "Q": [np.kron(eye, cost.Q[t].numpy()) / batch for t in steps]
        + [np.kron(eye, cost.Qf.numpy()) / batch],
        "R": [np.kron(np.eye(copies), cost.R[t].numpy()) * weight for t in steps],
        "N": [
            np.zeros((batch * len(cost.Q[t]), copies * len(cost.R[t])))
            if cost.N is None
            else np.kron(spread, cost.N[t].numpy()) / batch
            for t in steps
        ],
        "q": [
            np.zeros(batch * len(cost.Q[t])) if cost.q is None else vector(cost.q, t, batch) / batch
            for t in steps
        ]
        + [
            np.zeros(batch * len(cost.Qf))
            if cost.qf is None
            else np.tile(cost.qf.numpy(), batch) / batch
        ],
        "r": [
            np.zeros(copies * len(cost.R[t]))
            if cost.r is None
            else vector(cost.r, t, copies) * weight
            for t in steps
        ],
    }


def kkt(problem: ControlProblem, per_example: bool) -> tuple[Controls, list[Tensor]]:
    """Controls and costates of a linear-quadratic problem from one dense linear system.

    The unknowns are all states, controls and multipliers; the equations are the dynamics and
    ``p_L = Qf x_L + qf``, ``p_t = Q x + N u + q + A'p_{t+1}``, ``0 = R u + N'x + r + B'p_{t+1}``.
    """
    m = stacked(problem, per_example)
    horizon = len(m["A"])
    x0 = problem.x0.numpy().reshape(-1)
    sizes = [len(x0)] + [len(A) for A in m["A"]]
    controls = [B.shape[1] for B in m["B"]]
    names = (
        [("x", t, sizes[t]) for t in range(horizon + 1)]
        + [("u", t, controls[t]) for t in range(horizon)]
        + [("p", t, sizes[t]) for t in range(horizon + 1)]
    )
    place, total = {}, 0
    for kind, t, size in names:
        place[kind, t] = slice(total, total + size)
        total += size
    K, rhs = np.zeros((total, total)), np.zeros(total)
    row = 0

    def equation(size: int, terms: list[tuple[str, int, np.ndarray]], right: np.ndarray) -> None:
        nonlocal row
        rows = slice(row, row + size)
        for kind, t, matrix in terms:
            K[rows, place[kind, t]] += matrix
        rhs[rows] = right
        row += size

    equation(sizes[0], [("x", 0, np.eye(sizes[0]))], x0)
    for t in range(horizon):
        A, B, N = m["A"][t], m["B"][t], m["N"][t]
        eye = np.eye(sizes[t + 1])
        equation(sizes[t + 1], [("x", t + 1, eye), ("x", t, -A), ("u", t, -B)], m["c"][t])
        equation(
            sizes[t],
            [("p", t, -np.eye(sizes[t])), ("x", t, m["Q"][t]), ("u", t, N), ("p", t + 1, A.T)],
            -m["q"][t],
        )
        equation(controls[t], [("u", t, m["R"][t]), ("x", t, N.T), ("p", t + 1, B.T)], -m["r"][t])
    eye = np.eye(sizes[-1])
    equation(sizes[-1], [("p", horizon, -eye), ("x", horizon, m["Q"][-1])], -m["q"][-1])
    z = np.linalg.solve(K, rhs)

    batch = problem.x0.shape[:-1]
    lead = batch if per_example else ()
    u = tuple(
        torch.from_numpy(z[place["u", t]]).reshape(*lead, problem.dynamics.control_sizes[t])
        for t in range(horizon)
    )
    widths = [size // int(np.prod(batch)) for size in sizes]
    p = [
        torch.from_numpy(z[place["p", t]]).reshape(*batch, width) for t, width in enumerate(widths)
    ]
    return u, p


def box_optimum(problem: ControlProblem, like: Controls) -> Controls:
    """The minimum of a strictly convex quadratic ``J`` in the problem's box, by an interior point.

    The bounds that hold it are then known, and one linear system gives the minimum on that face.
    """
    assert problem.box is not None
    zeros = tuple(torch.zeros_like(u) for u in like)
    H, g = hessian(problem, zeros), flat(problem.gradient(zeros))
    bounds = [problem.box.bounds(t, u) for t, u in enumerate(like)]
    low, high = flat(tuple(b[0] for b in bounds)), flat(tuple(b[1] for b in bounds))
    z = cvxpy.Variable(len(g))
    quadratic = 0.5 * cvxpy.quad_form(z, cvxpy.psd_wrap(H.numpy())) + g.numpy() @ z
    above, below = z >= low.numpy(), z <= high.numpy()
    program = cvxpy.Problem(cvxpy.Minimize(quadratic), [above, below])
    program.solve(solver=cvxpy.CLARABEL)
    x = torch.from_numpy(z.value)
    duals = [torch.from_numpy(limit.dual_value) for limit in (above, below)]
    at_low, at_high = (dual > 1e-5 for dual in duals)
    x = torch.where(at_low, low, torch.where(at_high, high, x))
    free = ~(at_low | at_high)
    right = -(g + H @ torch.where(free, 0.0, x))[free]
    x[free] = torch.linalg.solve(H[free][:, free], right)
    return unflatten(x, like)
