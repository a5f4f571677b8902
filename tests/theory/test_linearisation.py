"""The linearised rollout against autograd, dense matrices and central differences."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.problem import ControlProblem, Controls, Cost, Dynamics
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.linearisation import Linearisation, differentiable_attention
from deltacontrol.theory.linear.step_graph import SecondDerivative, StepGraph
from tests.theory.dense import flat
from tests.theory.problems import (
    CASES,
    Case,
    embedding_problem,
    forgetful_problem,
    normal,
    residual_network,
)

F64 = torch.float64

EXTRA = (
    Case("embedding", embedding_problem),
    Case("forgetful", forgetful_problem),
)
cases = pytest.mark.parametrize("case", CASES + EXTRA, ids=lambda case: case.name)
keeps = pytest.mark.parametrize("keep", [False, True])


def random_like(tensors: Sequence[Tensor], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(x.shape, generator=generator, dtype=F64) for x in tensors)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


def linearised(case: Case, keep: bool) -> tuple[ControlProblem, Controls, Linearisation]:
    problem = case.make()
    u = case.start(problem, 0.7)
    return problem, u, Linearisation.of(problem, u, keep=keep)


@cases
@keeps
def test_the_adjoint_sweep_is_that_of_the_tangent_sweep(case: Case, keep: bool) -> None:
    problem, u, lin = linearised(case, keep)
    du, q = random_like(u, 1), random_like(lin.states, 2)
    integer = not problem.x0.is_floating_point()
    dx0 = torch.zeros(problem.x0.shape, dtype=F64) if integer else random_like([problem.x0], 3)[0]
    dx = lin.tangent(du, dx0)
    sources = [None, *q[1:-1]]
    costates, controls = lin.adjoint(q[-1], sources)
    forward = inner(dx[1:], q[1:])
    backward = inner(du, controls) + inner([dx0], [costates[0]])
    scale = (inner(dx[1:], dx[1:]) * inner(q[1:], q[1:])) ** 0.5
    assert abs(forward - backward) <= 1e-13 * scale


@cases
@keeps
def test_the_tangent_equals_the_derivative_of_the_rollout(case: Case, keep: bool) -> None:
    problem, u, lin = linearised(case, keep)
    du = random_like(u, 1)
    expected = torch.func.jvp(lambda *u: problem.rollout(u)[1:], u, du)[1]
    for _ in range(2):  # with `keep` the second product comes from the first one's graph
        for found, reference in zip(lin.tangent(du)[1:], expected, strict=True):
            torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "case", [c for c in CASES + EXTRA if not c.linear_quadratic], ids=lambda case: case.name
)
@keeps
def test_the_adjoint_of_the_terminal_gradient_gives_costates_and_gradient(
    case: Case, keep: bool
) -> None:
    """Where the running cost depends on ``u`` alone: ``B'p`` is the gradient without ``l_u``."""
    problem, u, lin = linearised(case, keep)
    now = problem.evaluate(u)
    costates, controls = lin.adjoint(now.costates[-1])
    for found, reference in zip(costates, now.costates, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-14)
    for t, (found, reference) in enumerate(zip(controls, now.gradient, strict=True)):
        leaf = u[t].clone().requires_grad_()
        cost = problem.cost.running(t, now.states[t], leaf)
        decay = torch.zeros_like(leaf)
        if cost.requires_grad:
            (decay,) = torch.autograd.grad(cost, leaf)
        torch.testing.assert_close(found + decay, reference, rtol=1e-12, atol=1e-14)


def test_states_of_integers_have_no_perturbation() -> None:
    problem = embedding_problem()
    u = random_like(problem.zero_controls(dtype=F64), 1)
    lin = Linearisation.of(problem, u)
    q, g = lin.adjoint_step(0, torch.ones(3, 5, 4, dtype=F64))
    assert q.shape == (3, 5) and q.dtype == F64 and not q.any() and g.shape == (0,)


@pytest.mark.parametrize("make", [residual_network, embedding_problem])
@keeps
def test_products_may_be_batched(make, keep: bool) -> None:
    """The first product, which makes the graph, is inside of `vmap` here."""
    problem = make()
    u = random_like(problem.zero_controls(dtype=F64), 1)
    lin = Linearisation.of(problem, u, keep=keep)
    rows = torch.randn(4, *lin.states[-1].shape, dtype=F64)
    many = torch.func.vmap(lambda q: lin.adjoint(q)[1])(rows)
    for i, row in enumerate(rows):
        assert torch.allclose(
            flat(tuple(g[i] for g in many)), flat(lin.adjoint(row)[1]), rtol=1e-13
        )
    columns = tuple(torch.randn(4, *control.shape, dtype=F64) for control in u)
    pushed = torch.func.vmap(lambda du: lin.tangent(du)[-1])(columns)
    for i in range(4):
        single = lin.tangent(tuple(c[i] for c in columns))[-1]
        torch.testing.assert_close(pushed[i], single, rtol=1e-13, atol=1e-15)


class Calls(Dynamics):
    """Counts the evaluations of the steps of another system."""

    def __init__(self, base: Dynamics) -> None:
        self.base, self.calls = base, 0
        self.horizon, self.control_sizes = base.horizon, base.control_sizes

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        self.calls += 1
        return self.base.step(t, x, u)


def test_keeping_evaluates_each_step_once() -> None:
    network = residual_network()
    calls = Calls(network.dynamics)
    problem = ControlProblem(calls, network.cost, network.x0)
    u = problem.zero_controls()
    evaluations = {}
    for keep in (False, True):
        lin = Linearisation.of(problem, u, keep=keep)
        calls.calls = 0
        for _ in range(3):
            dx = lin.tangent(random_like(u, 1))
            lin.adjoint(dx[-1])
        evaluations[keep] = calls.calls
    assert evaluations == {False: 6 * calls.horizon, True: calls.horizon}


class Attention(Dynamics):
    """One head of self-attention by the fused function; the control shifts the queries."""

    horizon = 1
    control_sizes = (4,)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        heads = x.unsqueeze(1)
        return torch.nn.functional.scaled_dot_product_attention(heads + u, heads, heads).squeeze(1)


class Squared(Cost):
    def terminal(self, x: Tensor) -> Tensor:
        return x.square().sum()


def test_fused_attention_is_differentiated_forward_and_twice() -> None:
    problem = ControlProblem(Attention(), Squared(), normal(2, 5, 4, seed=1))
    u, du = random_like(problem.zero_controls(), 1), random_like(problem.zero_controls(), 2)
    step = 1e-6
    ahead, back = (
        problem.rollout(tuple(a + s * b for a, b in zip(u, du, strict=True)))[-1]
        for s in (step, -step)
    )
    for keep in (False, True):
        pushed = Linearisation.of(problem, u, keep=keep).tangent(du)[-1]
        torch.testing.assert_close(pushed, (ahead - back) / (2 * step), rtol=1e-8, atol=1e-8)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(lambda u: problem.dynamics.step(0, problem.x0, u), u, du)
    with differentiable_attention():
        torch.func.jvp(lambda u: problem.dynamics.step(0, problem.x0, u), u, du)


def test_wrong_lengths_are_refused() -> None:
    problem = residual_network()
    u = problem.zero_controls()
    with pytest.raises(InputError, match="expected 6 states and 5 controls, but got 5 and 5"):
        Linearisation(problem.dynamics, problem.rollout(u)[1:], u)


def test_second_derivatives_of_a_step_equal_autograd() -> None:
    problem = residual_network()
    t, x, p = 2, normal(7, 4, seed=1), normal(7, 4, seed=2)
    u, dx, du = normal(3, seed=3), normal(7, 4, seed=4), normal(3, seed=5)

    def hamiltonian(x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return problem.cost.running(t, x, u) + (p * problem.dynamics.step(t, x, u)).sum()

    graph = StepGraph(
        lambda x, u: problem.dynamics.step(t, x, u),
        x,
        u,
        p,
        running=lambda x, u: problem.cost.running(t, x, u),
    )
    dx_next, cx, cu = graph.curve(dx, du)
    gradient = torch.func.grad(hamiltonian, argnums=(0, 1))
    expected = torch.func.jvp(lambda x, u: gradient(x, u, p), (x, u), (dx, du))[1]
    torch.testing.assert_close((cx, cu), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(dx_next, graph.tangent(dx, du), rtol=0, atol=0)


def test_second_derivatives_are_zero_where_there_are_none() -> None:
    x, tokens = normal(3, seed=1), torch.tensor([1, 2])
    linear = SecondDerivative(lambda x, n: 2 * x.sum(), [x, tokens])
    assert not any(part.any() for part in linear.curve([x, torch.zeros(2, dtype=F64)]))
    constant = SecondDerivative(lambda x: x.new_zeros(()), [x])
    assert not constant.curve([x])[0].any()
    square = SecondDerivative(lambda x: x.pow(4).sum(), [x])
    torch.testing.assert_close(square.curve([x])[0], 12 * x**3)
