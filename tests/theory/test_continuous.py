"""Continuous depth: closed forms, costates, orders of the discretisations, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import QuadraticCost, SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem, Controls, Cost, Dynamics, Evaluation
from deltacontrol.theory.control.systems import LinearDynamics, ResidualNetwork, Segment
from deltacontrol.theory.depth.continuous import (
    ContinuousDepth,
    DepthInterpolation,
    RefinedDynamics,
)
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.solvers import Shooting, Status, solve
from tests.theory.dense import flat
from tests.theory.problems import Forgetful, normal, varying

F64 = torch.float64
LAYERS = 2


def linear() -> tuple[LinearDynamics, Tensor, Tensor]:
    """``f(x, u) = (I + A) x + B u`` in each layer: ``x' = A x + B u``."""
    A, B = 0.7 * normal(3, 3, seed=1), normal(3, 2, seed=2)
    return LinearDynamics.constant(LAYERS, torch.eye(3, dtype=F64) + A, B), A, B


def propagators(A: Tensor, B: Tensor, s: float = 1.0) -> tuple[Tensor, Tensor]:
    """``exp(A s)`` and ``int_0^s exp(A r) dr B``, from one exponential of a larger matrix."""
    n, m = B.shape
    block = torch.zeros(n + m, n + m, dtype=F64)
    block[:n, :n], block[:n, n:] = A, B
    both = torch.linalg.matrix_exp(s * block)
    return both[:n, :n], both[:n, n:]


def test_linear_layers_are_matrix_exponentials() -> None:
    """``p(s) = exp(A'(L-s)) p(L)`` and ``dJ/du_t = (int_0^1 exp(A r) dr B)' p(t+1)``."""
    dynamics, A, B = linear()
    x0, target = normal(4, 3, seed=3), normal(4, 3, seed=4)
    u = tuple(normal(2, seed=10 + t) for t in range(LAYERS))
    found = ContinuousDepth(dynamics).evaluate(SquaredErrorCost(target), x0, u)
    E, G = propagators(A, B)
    states = [x0]
    for u_t in u:
        states.append(states[-1] @ E.mT + u_t @ G.mT)
    costates = [(states[-1] - target) / 4]
    for _ in u:
        costates.insert(0, costates[0] @ E)
    gradient = [(costates[t + 1] @ G).sum(0) for t in range(LAYERS)]
    for a, b in zip(found.states, states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    for a, b in zip(found.costates, costates, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    for a, b in zip(found.gradient, gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    exact = 0.5 * (states[-1] - target).square().sum() / 4
    assert float(found.objective) == pytest.approx(float(exact), rel=1e-9)


def test_harmonic_oscillator() -> None:
    """``x'' = u - x`` with ``u = 2`` from rest: ``x = 2 (1 - cos s)``, ``x' = 2 sin s``."""
    A = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], dtype=F64)
    dynamics = LinearDynamics.constant(LAYERS, A, torch.tensor([[0.0], [1.0]], dtype=F64))
    two = torch.full((1,), 2.0, dtype=F64)
    states = ContinuousDepth(dynamics).rollout(torch.zeros(2, dtype=F64), (two,) * LAYERS)
    for s, x in enumerate(states):
        assert float(x[0]) == pytest.approx(2 * (1 - math.cos(s)), abs=1e-9)
        assert float(x[1]) == pytest.approx(2 * math.sin(s), abs=1e-9)


def test_running_cost_is_integrated() -> None:
    """``x' = -x``, ``l = x^2/2 + r u^2/2``: ``int l = (1 - e^{-2L}) x_0^2/4 + r/2 sum u_t^2``."""
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    dynamics = LinearDynamics.constant(LAYERS, zero, zero)
    cost = QuadraticCost.constant(LAYERS, Q=one, R=3 * one, Qf=zero)
    u = tuple(normal(1, seed=t) for t in range(LAYERS))
    found = ContinuousDepth(dynamics).evaluate(cost, 2 * one[0], u)
    exact = (1 - math.exp(-2 * LAYERS)) + 1.5 * float(flat(u).square().sum())
    assert float(found.objective) == pytest.approx(exact, rel=1e-9)
    torch.testing.assert_close(flat(found.gradient), 3 * flat(u), rtol=1e-9, atol=1e-9)
    # dJ/dx_0 = (1 - e^{-2L}) x_0/2
    assert float(found.costates[0]) == pytest.approx(1 - math.exp(-2 * LAYERS), rel=1e-9)


class Growth(Dynamics):
    """``f_t(x, u) = x + (a_t + u) x``, so that ``x(L) = x_0 exp int (a + u)``."""

    horizon = 4
    control_sizes = (1, 1, 1, 1)
    rates = (0.3, -0.5, 0.2, 0.4)

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        return x + (self.rates[t] + u) * x


@pytest.mark.parametrize("weights", ["constant", "linear"])
@pytest.mark.parametrize("controls", ["constant", "linear"])
@pytest.mark.one_in(4)
def test_interpolation_between_layers(weights, controls) -> None:
    """The trapezoidal sum integrates a linear interpolation exactly, the left sum a constant."""
    u = tuple(normal(1, seed=t) for t in range(4))
    left = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=F64)
    trapezoidal = torch.tensor([0.5, 1.0, 1.0, 1.5], dtype=F64)  # the last layer goes on
    of_weights = left if weights == "constant" else trapezoidal
    of_controls = left if controls == "constant" else trapezoidal
    total = of_weights @ torch.tensor(Growth.rates, dtype=F64) + of_controls @ flat(u)
    x0 = torch.tensor([[1.5], [-0.5]], dtype=F64)
    depth = ContinuousDepth(Growth(), weights=weights, controls=controls)
    found = depth.evaluate(SquaredErrorCost(torch.zeros_like(x0)), x0, u)
    exact = x0 * total.exp()
    torch.testing.assert_close(found.states[-1], exact, rtol=1e-9, atol=1e-9)
    # J = mean 1/2 x(L)^2, dJ/du_t = mean x(L)^2 times the weight of u_t
    gradient = exact.square().mean() * of_controls
    torch.testing.assert_close(flat(found.gradient), gradient, rtol=1e-9, atol=1e-9)
    assert float(depth.control(1.25, u)) == pytest.approx(
        float(u[1] if controls == "constant" else 0.75 * u[1] + 0.25 * u[2])
    )


def test_a_residual_network_interpolates_its_weights() -> None:
    """Against the field written out; it is not the interpolation of the neighbouring fields."""
    network = ResidualNetwork.random(3, width=3, hidden=5, control_size=2, seed=1)
    assert isinstance(network, DepthInterpolation)
    x, v = normal(4, 3, seed=1), normal(2, seed=2)
    depth = ContinuousDepth(network, weights="linear")
    w1, w2, b = (0.75 * M[1] + 0.25 * M[2] for M in (network.W1, network.W2, network.B))
    field = depth.field(1.25, x, v)
    torch.testing.assert_close(field, torch.tanh(x @ w1.mT + v @ b.mT) @ w2.mT)
    fields = ContinuousDepth(Opaque(network), weights="linear").field(1.25, x, v)
    expected = 0.75 * network.step(1, x, v) + 0.25 * network.step(2, x, v) - x
    torch.testing.assert_close(fields, expected)
    assert float((field - fields).norm()) > 1e-3
    torch.testing.assert_close(depth.field(2.7, x, v), network.step(2, x, v) - x)
    torch.testing.assert_close(depth.field(3.0, x, v), network.step(2, x, v) - x)


class Opaque(Dynamics):
    """Steps whose weights cannot be read."""

    def __init__(self, inner: Dynamics) -> None:
        self.inner = inner
        self.horizon, self.control_sizes = inner.horizon, inner.control_sizes

    def step(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        return self.inner.step(t, x, u)


class Tracking(Cost):
    """``l = 1/2 mean ||x||^2 + (1 + t)/20 mean ||u||^2 + 1/10 mean sum x``, and a squared error."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def running(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        effort = (1 + t) / 20 * u.square().sum(-1).mean()
        return 0.5 * x.square().sum(-1).mean() + effort + 0.1 * x.sum(-1).mean()

    def terminal(self, x: Tensor) -> Tensor:
        return SquaredErrorCost(self.target).terminal(x)


def nonlinear(per_example: bool = False) -> tuple[ResidualNetwork, Cost, Tensor, Controls]:
    network = ResidualNetwork.random(2, width=3, hidden=6, control_size=2, seed=3)
    x0 = normal(4, 3, seed=5)
    lead = (4,) if per_example else ()
    u = tuple(normal(*lead, 2, seed=20 + t) for t in range(2))
    return network, Tracking(normal(4, 3, seed=6)), x0, u


CHOICES = [
    ("constant", "constant", False),
    pytest.param("linear", "constant", True, marks=pytest.mark.slow),
    pytest.param("linear", "linear", False, marks=pytest.mark.slow),
]
choices = pytest.mark.parametrize(("weights", "controls", "per_example"), CHOICES)


@pytest.mark.parametrize(("weights", "controls", "per_example"), CHOICES[1:])
def test_gradient_and_initial_costate_equal_central_differences(
    weights, controls, per_example
) -> None:
    network, cost, x0, u = nonlinear(per_example)
    depth = ContinuousDepth(network, weights=weights, controls=controls)
    found = depth.evaluate(cost, x0, u)
    du = tuple(normal(*u_t.shape, seed=40 + t) for t, u_t in enumerate(u))
    dx0 = normal(*x0.shape, seed=7)

    def objective(step: float) -> float:
        moved = tuple(a + step * b for a, b in zip(u, du, strict=True))
        return float(depth.objective(cost, x0 + step * dx0, moved))

    def difference(h: float) -> float:
        return (objective(h) - objective(-h)) / (2 * h)

    assert objective(0.0) == float(found.objective)
    extrapolated = (4 * difference(0.002) - difference(0.004)) / 3
    slope = float(flat(found.gradient) @ flat(du) + (found.costates[0] * dx0).sum())
    assert slope == pytest.approx(extrapolated, rel=1e-7)


def discrete(depth: ContinuousDepth, factor: int, method, cost: Cost, x0, u) -> Evaluation:
    """The refined system's numbers, at the ends of the layers and in the layers' controls."""
    refined = depth.refine(factor, method)
    found = ControlProblem(refined, refined.cost(cost), x0).evaluate(refined.lift(u))
    return Evaluation(
        found.states[::factor],
        found.costates[::factor],
        found.objective,
        refined.restrict(found.gradient),
    )


PARTS: dict[str, Callable[[Evaluation], Tensor]] = {
    "state": lambda e: torch.cat([x.flatten() for x in e.states]),
    "costate": lambda e: torch.cat([p.flatten() for p in e.costates]),
    "gradient": lambda e: flat(e.gradient),
}


@choices
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2)])
@pytest.mark.one_in(2)
def test_discretisations_converge_at_their_order(
    method, order, weights, controls, per_example
) -> None:
    """Slope of ``log error`` over ``log factor``.

    The objective is taken from several starts: the leading term of the error of one number can
    happen to be small, that of a vector does not.
    """
    network, cost, x0, u = nonlinear(per_example)
    depth = ContinuousDepth(network, weights=weights, controls=controls)
    starts = [x0, *(normal(*x0.shape, seed=50 + i) for i in range(3))]
    limit = depth.evaluate(cost, x0, u)
    objectives = torch.stack([depth.objective(cost, x, u) for x in starts])
    factors = (32, 64)
    errors: dict[str, list[float]] = {name: [] for name in ("objective", *PARTS)}
    for factor in factors:
        found = discrete(depth, factor, method, cost, x0, u)
        for name, part in PARTS.items():
            errors[name].append(float((part(found) - part(limit)).norm()))
        refined = depth.refine(factor, method)
        problems = (ControlProblem(refined, refined.cost(cost), x) for x in starts)
        values = torch.stack([problem.objective(refined.lift(u)) for problem in problems])
        assert float(values[0]) == pytest.approx(float(found.objective), rel=1e-12)
        errors["objective"].append(float((values - objectives).norm()))
    x = torch.tensor(factors, dtype=F64).log()
    for name, values in errors.items():
        y = torch.tensor(values, dtype=F64).log()
        slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
        assert abs(slope + order) <= 0.1, (name, slope, values)


@pytest.mark.slow
def test_the_integration_is_far_more_exact_than_the_discretisation() -> None:
    """Tighter tolerances change nothing that the orders above could see."""
    network, cost, x0, u = nonlinear()
    found = ContinuousDepth(network).evaluate(cost, x0, u)
    tight = ContinuousDepth(network, rtol=1e-12, atol=1e-13).evaluate(cost, x0, u)
    for part in PARTS.values():
        torch.testing.assert_close(part(found), part(tight), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.objective, tight.objective, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weights", ["constant", "linear"])
def test_one_euler_step_a_layer_is_the_layered_system(weights) -> None:
    network, cost, x0, u = nonlinear()
    depth = ContinuousDepth(network, weights=weights)
    found = discrete(depth, 1, "euler", cost, x0, u)
    layered = ControlProblem(network, cost, x0).evaluate(u)
    for part in PARTS.values():
        torch.testing.assert_close(part(found), part(layered), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.objective, layered.objective, rtol=1e-13, atol=1e-13)


def test_restrict_is_the_transpose_of_lift() -> None:
    for method in ("euler", "midpoint"):
        refined = ContinuousDepth(Growth(), controls="linear").refine(5, method)
        u = tuple(normal(1, seed=t) for t in range(4))
        g = tuple(normal(1, seed=30 + k) for k in range(20))
        forward, backward = flat(refined.lift(u)) @ flat(g), flat(u) @ flat(refined.restrict(g))
        torch.testing.assert_close(forward, backward, rtol=1e-13, atol=1e-13)


def test_a_refined_system_is_solved_like_any_other() -> None:
    """Least energy for ``x' = u``: ``u`` constant, ``x(L) = x_0/(1 + L)``, at every refinement."""
    zero, one = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    dynamics = LinearDynamics.constant(LAYERS, one, one)
    cost = QuadraticCost.constant(LAYERS, Q=zero, R=one, Qf=one)
    for factor in (1, 4):
        refined = ContinuousDepth(dynamics).refine(factor)
        problem = ControlProblem(refined, refined.cost(cost), one[0])
        found = solve(problem, Shooting(), problem.zero_controls(), max_steps=50, tol=1e-10)
        assert found.status is Status.CONVERGED
        exact = torch.full((factor * LAYERS,), -1 / (1 + LAYERS), dtype=F64)
        torch.testing.assert_close(flat(found.controls), exact, rtol=1e-8, atol=1e-8)


class Lagrange(Cost):
    """``l = 1/2 ||x||^2``, and a terminal cost that is a constant."""

    def running(self, t: int, x: Tensor, u: Tensor) -> Tensor:
        return 0.5 * x.square().sum()

    def terminal(self, x: Tensor) -> Tensor:
        return x.new_ones(())


def test_layers_without_control_and_a_constant_terminal_cost() -> None:
    """``x' = -x``: ``J = 1 + (1 - e^{-2L}) |x_0|^2/4``, ``p(0) = (1 - e^{-2L}) x_0/2``."""
    dynamics = LinearDynamics(A=torch.zeros(2, 3, 3, dtype=F64), B=torch.zeros(2, 3, 0, dtype=F64))
    x0 = normal(3, seed=1)
    u = (torch.zeros(0, dtype=F64),) * 2
    found = ContinuousDepth(dynamics).evaluate(Lagrange(), x0, u)
    decay = 1 - math.exp(-4)
    assert float(found.objective) == pytest.approx(1 + decay * float(x0.square().sum()) / 4)
    torch.testing.assert_close(found.costates[0], decay * x0 / 2, rtol=1e-9, atol=1e-9)
    assert float(found.costates[-1].abs().max()) == 0.0
    assert [g.shape for g in found.gradient] == [(0,), (0,)]


def test_a_step_that_ignores_its_control_and_one_that_ignores_its_state() -> None:
    dynamics = Segment(Forgetful(), 0, 3)
    u = tuple(normal(2, seed=t) for t in range(3))
    x0 = 0.3 * normal(2, seed=4)
    depth = ContinuousDepth(dynamics)
    found = depth.evaluate(SquaredErrorCost(torch.zeros_like(x0)), x0, u)
    assert float(found.gradient[2].abs().max()) == 0.0
    E = math.exp(-1.0)  # x' = sin u - x in step 1
    expected = found.states[1] * E + u[1].sin() * (1 - E)
    torch.testing.assert_close(found.states[2], expected, rtol=1e-9, atol=1e-9)


def test_steps_that_change_the_shape_are_refused() -> None:
    problem = varying(None)
    u = problem.zero_controls()
    with pytest.raises(InputError, match=r"step 0 maps a state of shape \(3,\).* to \(4,\)"):
        ContinuousDepth(problem.dynamics).rollout(problem.x0, u)
    refined = ContinuousDepth(Segment(problem.dynamics, 1, 3)).refine(2)
    with pytest.raises(InputError, match=r"step 1 maps a state of shape \(4,\).* to \(2,\)"):
        ControlProblem(refined, problem.cost, normal(4, seed=1)).rollout(refined.lift((u[1], u[2])))


def test_bad_input() -> None:
    problem = varying(None)
    with pytest.raises(InputError, match="controls of one size"):
        ContinuousDepth(problem.dynamics, weights="linear")
    with pytest.raises(InputError, match="unknown interpolation 'cubic'"):
        ContinuousDepth(Growth(), controls="cubic")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown method 'heun'"):
        ContinuousDepth(Growth()).refine(2, "heun")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="factor = 0"):
        RefinedDynamics(ContinuousDepth(Growth()), 0)
    with pytest.raises(InputError, match=r"outside of \[0, 4\]"):
        ContinuousDepth(Growth()).field(4.5, torch.ones(1), torch.ones(1))
    with pytest.raises(InputError, match="20 gradients, one a step, got 4"):
        ContinuousDepth(Growth()).refine(5).restrict((torch.ones(1),) * 4)
    with pytest.raises(InputError, match="control at step 1"):
        ones = (torch.ones(1), torch.ones(2), torch.ones(1), torch.ones(1))
        ContinuousDepth(Growth()).rollout(torch.ones(1), ones)
    with pytest.raises(InputError, match="needs floats"):
        ContinuousDepth(Growth()).rollout(torch.ones(1, dtype=torch.long), (torch.ones(1),) * 4)


def test_tolerances_that_the_numbers_cannot_meet() -> None:
    u = (torch.full((1,), math.nan, dtype=F64),) * 4
    with pytest.raises(InputError, match="layer 0 cannot meet rtol = 1e-10"):
        ContinuousDepth(Growth()).rollout(torch.ones(1, dtype=F64), u)
