"""Claim 27: Riccati gains with cross terms foretell how optimal controls answer a changed state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from deltacontrol.theory.claims import Claim, Evidence, Part, Threshold

if TYPE_CHECKING:
    from torch import Tensor

    from deltacontrol.theory.control.problem import ControlProblem, Controls
    from deltacontrol.theory.solvers.quadratic_model import Policy, QuadraticModel

# Each text is a problem of its own: all layers of the model, few gains a layer, and the class that
# the text does not have as the target, so that the costates are far from zero.
MODEL, TASK, TOKENS, HEAD_ROWS = "minilm-l3", "movie", 4, 256
EXAMPLES, COORDINATES, DELTA = 8, 8, "ia3"
WEIGHT = 0.01  # λ of the running cost λ/2 ‖u_t‖²
# Of the change of the state that enters the first layer, over the norm of that state.
RADIUS, SMALL = 1e-2, 1e-3
TOLERANCE = 1e-10  # of the gradient of J, absolute
STEPS = 60  # of Newton's method
PROPORTIONAL = 0.8  # the slope of log error against log radius is at least this


@dataclass(frozen=True, eq=False)
class _Optimum:
    """An optimum of one text's problem, and its second-order expansion there.

    Attributes:
        problem: minimise J.
        controls: its minimiser u*.
        states: the trajectory of u*.
        model: A_t, B_t and the Hessians of the Hamiltonians at u*.
        residual: ‖∇J(u*)‖.
    """

    problem: ControlProblem
    controls: Controls
    states: list[Tensor]
    model: QuadraticModel
    residual: float


def _solved(problem: ControlProblem, start: Controls) -> tuple[Controls, float]:
    """The minimiser that Newton's method reaches, and the norm of the gradient there."""
    from deltacontrol.theory.solvers import NewtonCG, solve

    found = solve(problem, NewtonCG(), start, max_steps=STEPS, tol=TOLERANCE)
    return found.controls, found.residual.norm


def _expanded(problem: ControlProblem, controls: Controls) -> _Optimum:
    """The second-order expansion, with second derivatives of the dynamics."""
    from deltacontrol.theory.solvers.quadratic_model import QuadraticModel

    now = problem.evaluate(controls)
    model = QuadraticModel.of(problem, controls, now, second_order=True)
    residual = problem.residual_of(controls, now.gradient).norm
    return _Optimum(problem, controls, [x.detach() for x in now.states], model, residual)


@cache
def _setting() -> Any:
    from deltacontrol.experiments.setting import Setting

    return Setting(
        MODEL, TASK, deltas=(DELTA,), add_head=False, train_rows=EXAMPLES, test_rows=0,
        order="shuffled", strict_rows=True, max_length=TOKENS, head="ridge", head_rows=HEAD_ROWS,
        dtype="float64",
    )  # fmt: skip


@cache
def _optimum(row: int) -> _Optimum:
    """One text: its layers, the other class as the target."""
    import torch

    from deltacontrol.deltas.dynamics.transformer import TransformerDynamics
    from deltacontrol.theory.control.costs import CrossEntropyCost
    from deltacontrol.theory.control.problem import ControlProblem
    from deltacontrol.theory.control.reduced import ReducedDynamics

    batch = _setting().batch("train", [row])
    whole = TransformerDynamics(_setting().controlled, batch)
    offsets = whole.controls()
    x0 = whole.step(0, whole.x0, offsets[0]).detach()
    random = torch.Generator().manual_seed(row)
    bases = [
        torch.linalg.qr(
            torch.randn(len(o), min(COORDINATES, len(o)), generator=random, dtype=o.dtype)
        ).Q
        for o in offsets[1:]
    ]
    steps = ReducedDynamics(whole, 1, offsets[1:], bases)
    cost = CrossEntropyCost(1 - batch["labels"], weight_decay=WEIGHT)
    problem = ControlProblem(steps, cost, x0)
    return _expanded(problem, _solved(problem, problem.initial_controls())[0])


@cache
def _linear(row: int) -> _Optimum:
    """The same with every step replaced by its first-order expansion at the optimum.

    The gradient of J there stays as it is, so that the optimum is one of both problems.
    """
    from deltacontrol.theory.control.reduced import AffineDynamics

    of = _optimum(row)
    A, B = ([part[0] for part in parts] for parts in (of.model.A, of.model.B))
    steps = AffineDynamics(of.states, of.controls, A, B)
    return _expanded(replace(of.problem, dynamics=steps), of.controls)


@cache
def _change(row: int) -> Tensor:
    """The direction in which the first state is changed: random, as long as the state is."""
    import torch

    x0 = _optimum(row).problem.x0
    random = torch.Generator().manual_seed(1000 + row)
    direction = torch.randn(x0.shape, generator=random, dtype=x0.dtype)
    return direction * (x0.norm() / direction.norm())


@cache
def _answer(row: int, radius: float, linear: bool) -> tuple[Tensor, float]:
    """How the minimiser moves with the first state, by solving again; and the gradient's norm."""
    import torch

    of = (_linear if linear else _optimum)(row)
    moved = replace(of.problem, x0=of.problem.x0 + radius * _change(row))
    new, residual = _solved(moved, of.controls)
    return torch.cat(new) - torch.cat(of.controls), residual


@cache
def _policy(row: int, cross: bool, linear: bool) -> Policy:
    """Gains and value functions of the expansion.

    Without ``cross`` the second derivatives of the Hamiltonian in control and state are dropped.

    Raises:
        IndefiniteError: the expansion has no minimum.
    """
    from deltacontrol.theory.solvers.quadratic_model import sweep

    model = (_linear if linear else _optimum)(row).model
    if not cross:
        steps = zip(model.W, model.A, strict=True)
        model = replace(model, W=[_without_cross(W, A) for W, A in steps])
    return sweep(model)


def _foretold(of: _Optimum, policy: Policy, dx: Tensor) -> Tensor:
    """``du_t = K_t dx_t`` along ``dx_{t+1} = A_t dx_t + B_t du_t``."""
    import torch

    dx, answer = dx.reshape(-1), []
    for A, B, K in zip(of.model.A, of.model.B, policy.K, strict=True):
        answer.append(K[0] @ dx)
        dx = A[0] @ dx + B[0] @ answer[-1]
    return torch.cat(answer)


def _without_cross(W: Tensor, A: Tensor) -> Tensor:
    n, W = A.shape[-1], W.clone()
    W[:, n:, :n] = 0
    W[:, :n, n:] = 0
    return W


def _error(row: int, radius: float, cross: bool, linear: bool) -> float:
    """The relative error of what the gains foretell; 1 where the expansion has no minimum.

    Such an expansion foretells nothing, hence no change.
    """
    from deltacontrol.theory.solvers.quadratic_model import IndefiniteError

    of = (_linear if linear else _optimum)(row)
    true, _ = _answer(row, radius, linear)
    try:
        policy = _policy(row, cross, linear)
    except IndefiniteError:
        return 1.0
    return float((_foretold(of, policy, radius * _change(row)) - true).norm() / true.norm())


def _assumptions(radii: tuple[float, ...], linear: bool) -> dict[str, Any]:
    """What was assumed, and the numbers that show it."""
    least, residuals, moves = [], [], []
    for row in range(EXAMPLES):
        of = (_linear if linear else _optimum)(row)
        residuals.append(of.residual)
        least.append(_least_curvature(row, linear))
        for radius in radii:
            answer, residual = _answer(row, radius, linear)
            residuals.append(residual)
            moves.append(float(answer.norm()))
    return {
        "details": {
            "largest gradient at a minimiser": max(residuals),
            "least eigenvalue of Q_uu": min(least),
            "answers of the controls": moves,
        },
        "assumptions": {
            "all points are stationary": max(residuals) <= TOLERANCE,
            "the expansion is convex in the controls": min(least) > 0,
        },
    }


@cache
def _least_curvature(row: int, linear: bool) -> float:
    """The least eigenvalue of ``Q_uu`` over the steps; -1 where a sweep finds it indefinite."""
    import torch

    from deltacontrol.theory.solvers.quadratic_model import IndefiniteError

    try:
        V = _policy(row, True, linear).V
    except IndefiniteError:
        return -1.0
    model, least = (_linear if linear else _optimum)(row).model, []
    for W, B, after in zip(model.W, model.B, V[1:], strict=True):
        if m := B.shape[-1]:
            Q = W[0, -m:, -m:] + B[0].mT @ after[0] @ B[0]
            least.append(float(torch.linalg.eigvalsh(Q)[0]))
    return min(least)


def _at_the_radius(cross: bool, linear: bool = False) -> Evidence:
    """The relative errors at the radius, one a text."""
    errors = [_error(row, RADIUS, cross, linear) for row in range(EXAMPLES)]
    return Evidence.mean(
        errors,
        "text",
        note=f"{MODEL}, {EXAMPLES} texts of {TASK} of {TOKENS} tokens, {COORDINATES} coordinates "
        f"of {DELTA} a layer, the first state changed by {RADIUS:g} of its norm",
        **_assumptions((RADIUS,), linear),
    )


def _slopes(cross: bool, linear: bool = False) -> Evidence:
    """The slope of log error against log radius, one a text."""
    import math

    slopes = []
    for row in range(EXAMPLES):
        far, near = (_error(row, radius, cross, linear) for radius in (RADIUS, SMALL))
        slopes.append(math.log(far / near) / math.log(RADIUS / SMALL))
    return Evidence.mean(
        slopes,
        "text",
        note=f"between changes of {SMALL:g} and {RADIUS:g} of the first state's norm",
        **_assumptions((RADIUS, SMALL), linear),
    )


# Fewer cases, for `claims run --preset quick`.
QUICK = {"EXAMPLES": 2}

CLAIM = Claim(
    id=27,
    name="riccati-response",
    title="Riccati gains with cross terms foretell the answer of optimal controls",
    statement=(
        "at a minimiser of J with positive definite Q_uu, K_t of the second-order expansion, with "
        "the second derivatives H_ux of the Hamiltonian in Q_ux = H_ux + B'VA, gives the change of "
        "the optimal controls with the state, du_t = K_t dx_t, to first order: on a real model's "
        "layers within 10 % at a change of one per cent of the state's norm (a), with an error "
        "that falls at least in proportion to the change (b)"
    ),
    source="ours; the expansion is Jacobson & Mayne, Differential Dynamic Programming, 1970",
    notebook="27_riccati_response",
    predict=lambda: {},
    parts=(
        Part(
            name="a",
            title="The gains foretell the answer within 10 %",
            threshold=Threshold("<=", 0.1, "mean relative error of the controls' change"),
            measure=lambda prediction: _at_the_radius(cross=True),
            # The second derivatives in control and state dropped, as iLQR does.
            negative_control=lambda prediction: _at_the_radius(cross=False),
            # Steps that are linear have no such derivatives.
            passing_control=lambda prediction: _at_the_radius(cross=False, linear=True),
            on="real model, untrained",
        ),
        Part(
            name="b",
            title="Their error falls with the change",
            threshold=Threshold(">=", PROPORTIONAL, "slope of log error against log radius"),
            measure=lambda prediction: _slopes(cross=True),
            negative_control=lambda prediction: _slopes(cross=False),
            passing_control=lambda prediction: _slopes(cross=False, linear=True),
            on="real model, untrained",
        ),
    ),
)
