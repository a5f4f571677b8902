"""Derivatives of solutions in their problem's parameters: finite differences and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.problem import Box, ControlProblem
from deltacontrol.theory.control.systems import LinearDynamics, ResidualNetwork
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.lq import riccati
from deltacontrol.theory.solvers import DDP, MSA, NewtonCG
from deltacontrol.theory.solvers.implicit import differentiable_solve

L, N, M = 3, 3, 2


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def linear(A: Tensor, B: Tensor, root: Tensor, q: Tensor, x0: Tensor) -> ControlProblem:
    """Costs whose matrices are positive definite whatever ``root`` is."""
    Q = root @ root.mT + torch.eye(N, dtype=A.dtype)
    R = torch.eye(M, dtype=A.dtype).expand(L, M, M)
    cost = QuadraticCost(Q[:-1], R, Q[-1], q=q)
    return ControlProblem(LinearDynamics(A, B), cost, x0)


LINEAR = (
    normal(1, L, N, N) / 2, normal(2, L, N, M), normal(3, L + 1, N, N), normal(4, L, N),
)  # fmt: skip


def network(W1: Tensor, W2: Tensor, target: Tensor, x0: Tensor) -> ControlProblem:
    B = normal(9, L, 4, M)
    return ControlProblem(ResidualNetwork(W1, W2, B), SquaredErrorCost(target, 0.5), x0)


NETWORK = (normal(5, L, 4, N) / 2, normal(6, L, N, 4) / 3, normal(7, N))


def functional(make, solver):
    """A scalar of the optimal controls, with weights that see every entry."""

    def value(*parameters: Tensor) -> Tensor:
        controls, _ = differentiable_solve(make, *parameters, solver=solver, tol=1e-12)
        flat = torch.cat([u.reshape(-1) for u in controls])
        return (
            flat * torch.linspace(1, 2, len(flat), dtype=flat.dtype)
        ).sum() + flat.square().sum()

    return value


@pytest.mark.parametrize("x0", [normal(8, N), normal(8, 4, N)], ids=["one", "batch"])
@pytest.mark.parametrize(
    ("make", "parameters"), [(linear, LINEAR), (network, NETWORK)], ids=["linear", "network"]
)
def test_gradients_are_those_of_finite_differences(make, parameters, x0) -> None:
    if make is network and x0.ndim == 2:
        parameters = (*parameters[:2], normal(7, 4, N))
    given = [value.clone().requires_grad_() for value in (*parameters, x0)]
    assert torch.autograd.gradcheck(
        functional(make, NewtonCG()), given, eps=1e-5, atol=1e-7, rtol=1e-6, fast_mode=True
    )


def test_the_derivative_is_that_of_the_riccati_gains() -> None:
    """``u_0 = K_0 x_0`` is linear in the state."""
    A, B, root, _ = LINEAR
    Q = root @ root.mT + torch.eye(N, dtype=A.dtype)
    R = torch.eye(M, dtype=A.dtype).expand(L, M, M)
    policy = riccati(A, B, Q[:-1], R, Q[-1])
    x0 = normal(8, N).requires_grad_()
    controls, solution = differentiable_solve(
        lambda x0: linear(A, B, root, torch.zeros(L, N, dtype=A.dtype), x0), x0, solver=DDP()
    )
    for i in range(M):
        (row,) = torch.autograd.grad(controls[0][i], x0, retain_graph=True)
        torch.testing.assert_close(row, policy.gains[0][i], rtol=1e-8, atol=1e-10)
    assert solution.status.value == "converged" and not solution.controls[0].requires_grad


def test_the_solver_makes_no_difference() -> None:
    W1, W2, target = NETWORK
    found = []
    for solver in (NewtonCG(), DDP()):
        t = target.clone().requires_grad_()
        value = functional(lambda t: network(W1, W2, t, normal(8, N)), solver)(t)
        found.append(torch.autograd.grad(value, t)[0])
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


def test_problems_of_a_batch_are_those_of_each_alone() -> None:
    """Controls per example: a batch of problems in one solve, its cost the mean of theirs."""
    W1, W2, _ = NETWORK
    x0, target = normal(11, 3, N), normal(12, 3, N)

    def make(t: Tensor, x: Tensor = x0) -> ControlProblem:
        B = normal(9, L, 4, M)
        return ControlProblem(ResidualNetwork(W1, W2, B), SquaredErrorCost(t, 0.5), x)

    whole = target.clone().requires_grad_()
    u0 = make(target).zero_controls(per_example=True)
    controls, _ = differentiable_solve(make, whole, solver=NewtonCG(), u0=u0, tol=1e-12)
    sum(u.sum() for u in controls).backward()
    for i in range(3):
        alone = target[i].clone().requires_grad_()
        mine, _ = differentiable_solve(
            lambda t, i=i: make(t, x0[i]), alone, solver=NewtonCG(), tol=1e-12
        )
        for u, one in zip(controls, mine, strict=True):
            torch.testing.assert_close(u[i], one, rtol=1e-8, atol=1e-10)
        sum(u.sum() for u in mine).backward()
        torch.testing.assert_close(whole.grad[i], alone.grad, rtol=1e-7, atol=1e-9)


def test_controls_that_a_bound_holds_have_no_derivative() -> None:
    """``min 1/2 u^2 + 1/2 (x + u)^2`` over ``|u| <= 1`` is ``clip(-x/2)``."""
    one = torch.ones(1, 1, dtype=torch.float64)

    def make(x0: Tensor) -> ControlProblem:
        cost = QuadraticCost.constant(1, Q=0 * one, R=one, Qf=one)
        return ControlProblem(LinearDynamics.constant(1, one, one), cost, x0, Box(-1.0, 1.0))

    for x, slope in ((1.0, -0.5), (3.0, 0.0)):
        x0 = torch.tensor([x], dtype=torch.float64, requires_grad=True)
        controls, _ = differentiable_solve(make, x0, solver=DDP())
        controls[0].sum().backward()
        assert x0.grad is not None and x0.grad.item() == pytest.approx(slope, abs=1e-12)


def test_the_envelope() -> None:
    """The derivative of the optimal value is that of J at fixed controls."""
    W1, W2, target = NETWORK
    t = target.clone().requires_grad_()
    controls, _ = differentiable_solve(
        lambda t: network(W1, W2, t, normal(8, N)), t, solver=NewtonCG(), tol=1e-12
    )
    make = network(W1, W2, t, normal(8, N))
    (through,) = torch.autograd.grad(make.objective(controls), t, retain_graph=True)
    (fixed,) = torch.autograd.grad(make.objective([u.detach() for u in controls]), t)
    torch.testing.assert_close(through, fixed, rtol=1e-9, atol=1e-11)


def test_what_has_no_derivative_is_refused() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)

    def flat(x0: Tensor) -> ControlProblem:
        """Two controls of which only the sum counts."""
        B = torch.ones(1, 2, dtype=torch.float64)
        cost = QuadraticCost.constant(1, Q=0 * one, R=torch.zeros(2, 2).double(), Qf=one)
        return ControlProblem(LinearDynamics.constant(1, one, B), cost, x0)

    x0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    controls, _ = differentiable_solve(flat, x0, solver=DDP())
    with pytest.raises(InputError, match="the optimum is not isolated"):
        controls[0][0].backward()
    with pytest.raises(InputError, match="MSA ended max_steps .* only an optimum has a derivative"):
        differentiable_solve(
            lambda x: network(*NETWORK, x), normal(8, N), solver=MSA(1e-3), max_steps=1, tol=1e-12
        )
    with pytest.raises(InputError, match="parameter 0 is torch.int64"):
        differentiable_solve(flat, torch.ones(1, dtype=torch.int64), solver=DDP())
