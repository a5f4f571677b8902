"""Derivatives of a solution in the parameters of its problem, by the implicit function theorem.

An optimum ``u*(theta)`` of ``J(u, theta)`` keeps ``grad_u J(u*(theta), theta) = 0``, so that

    du*/dtheta = - H^{-1} d/dtheta grad_u J,        H = Hess_u J(u*, theta),

and a vector ``v`` is pulled back to ``- w' d/dtheta grad_u J`` with ``H w = v``: one solve by
conjugate gradients with products by ``H``, whatever the number of parameters, and no memory of the
iterations that led to ``u*``. In a box, controls held by a bound stay there, and the same holds of
the others alone (where no multiplier of a bound is zero). A batch of problems is one problem whose
controls are per example.

By the envelope theorem the derivative of ``min J`` itself needs none of this: it is that of ``J``
at fixed controls.

Source: Krantz & Parks, *The Implicit Function Theorem*, 2013; Amos & Kolter, *OptNet*, ICML 2017;
Amos, Jimenez, Sacks, Boots & Kolter, *Differentiable MPC*, NeurIPS 2018; Blondel et al., *Efficient
and modular implicit differentiation*, NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.conjugate_gradients import End, conjugate_gradients
from deltacontrol.theory.linear.curvature import HessianCurvature
from deltacontrol.theory.linear.operator import Congruence, Diagonal, flatten, unflatten
from deltacontrol.theory.solvers.solution import Solution, Status
from deltacontrol.theory.solvers.solving import Solver, solve

__all__ = ["differentiable_solve"]


@typed
def differentiable_solve(
    make: Callable[..., ControlProblem],
    *parameters: Tensor,
    solver: Solver,
    u0: Controls | None = None,
    max_steps: int | None = None,
    tol: float | None = None,
    rtol: float = 1e-10,
    max_products: int = 1000,
) -> tuple[Controls, Solution]:
    """Solve a problem, with controls that automatic differentiation can follow to its parameters.

    Args:
        make: builds the problem from the parameters by differentiable operations; it is called
            again, with the same values, for the derivatives.
        parameters: tensors of floats; the derivatives are in those that require a gradient.
        solver: the method. The derivatives are those of the optimum, whichever method found it.
        u0: initial controls, as in `solve`.
        max_steps: as in `solve`.
        tol: as in `solve`; an error of the controls enters their derivatives in proportion.
        rtol: relative residual at which the linear solve of a derivative stops.
        max_products: products with the Hessian that it may take.

    Returns:
        The optimal controls, attached to the parameters, and the solution, which is not.

    Raises:
        InputError: the solve did not converge, or, in the backward pass, the Hessian is singular or
            indefinite at the solution, so that the optimum is not isolated and has no derivative.

    Example:
        ``u* = -x q/(1 + q)`` minimises ``1/2 u^2 + q/2 (x + u)^2``, so ``du*/dq = -x/(1 + q)^2``:

        >>> from deltacontrol.theory import LinearDynamics, NewtonCG, QuadraticCost
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> q = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
        >>> def make(q):
        ...     cost = QuadraticCost.constant(1, Q=0 * one, R=one, Qf=q)
        ...     return ControlProblem(LinearDynamics.constant(1, one, one), cost, x0=one[0])
        >>> controls, _ = differentiable_solve(make, q, solver=NewtonCG())
        >>> controls[0].sum().backward()
        >>> round(q.grad.item(), 9)
        -0.25
    """
    for number, parameter in enumerate(parameters):
        if not parameter.is_floating_point():
            raise InputError(
                f"parameter {number} is {parameter.dtype}; derivatives need floats: close over "
                "what is no parameter in `make`"
            )
    with torch.no_grad():
        problem = make(*(parameter.detach() for parameter in parameters))
    solution = solve(problem, solver, u0, max_steps=max_steps, tol=tol)
    if solution.status is not Status.CONVERGED:
        raise InputError(
            f"{type(solver).__name__} ended {solution.status.value} ({solution.message}); only an "
            "optimum has a derivative: allow more steps, or take another solver"
        )
    given = _Given(make, solution.controls, rtol, max_products)
    controls = _Optimum.apply(given, *parameters)
    return tuple(controls), solution  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class _Given:
    """What the backward pass needs beside the parameters."""

    make: Callable[..., ControlProblem]
    controls: Controls
    rtol: float
    max_products: int


class _Optimum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: _Given, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.given = given
        ctx.save_for_backward(*parameters)
        return tuple(control.clone() for control in given.controls)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        given: _Given = ctx.given
        wanted = ctx.needs_input_grad[1:]
        parameters = [
            value.detach().requires_grad_(needed)
            for value, needed in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        w = unflatten(_solved(given, parameters, flatten(slopes)), given.controls)
        with torch.enable_grad():
            u = tuple(control.detach().requires_grad_() for control in given.controls)
            objective = given.make(*parameters).objective(u)
            gradient = torch.autograd.grad(objective, u, create_graph=True, allow_unused=True)
            along = [(g * w_t).sum() for g, w_t in zip(gradient, w, strict=True) if g is not None]
            total = sum(along, objective.new_zeros(()))
            leaves = [p for p in parameters if p.requires_grad]
            if not total.requires_grad:
                found: list[Tensor | None] = [None] * len(leaves)
            else:
                found = list(torch.autograd.grad(-total, leaves, allow_unused=True))
        ahead = iter(found)
        return (None, *(next(ahead) if p.requires_grad else None for p in parameters))


def _solved(given: _Given, parameters: list[Tensor], v: Tensor) -> Tensor:
    """``w`` with ``H w = v`` on the controls that no bound holds, zero on the others."""
    with torch.no_grad():
        problem = given.make(*(parameter.detach() for parameter in parameters))
    u = given.controls
    free = torch.ones_like(v)
    if problem.box is not None:
        gradient = problem.gradient(u)
        moved = problem.box.project(tuple(a - g for a, g in zip(u, gradient, strict=True)))
        held = []
        for t, (control, ahead) in enumerate(zip(u, moved, strict=True)):
            low, high = problem.box.bounds(t, control)
            held.append(((ahead == low) | (ahead == high)).to(control.dtype))
        free = 1 - flatten(held)
    H = Congruence(Diagonal(free), HessianCurvature(problem, u))  # CG stays on the free entries
    found = conjugate_gradients(H, -(free * v), rtol=given.rtol, max_products=given.max_products)
    if found.end in (End.SINGULAR, End.NEGATIVE_CURVATURE, End.NOT_FINITE):
        raise InputError(
            f"the Hessian of J at the solution has no inverse on the controls ({found.end.value}): "
            "the optimum is not isolated, and has no derivative; add a running cost of the controls"
        )
    if found.end is End.PRODUCTS:
        raise InputError(
            f"the linear solve of the derivative reached a relative residual of "
            f"{found.residual:.2g} in {found.products} products, above rtol {given.rtol:.2g}; "
            "allow more max_products, or raise rtol"
        )
    return found.step
