"""The control problem: gradients by costates, adjoints, shapes, what may be ignored."""

import math

import pytest
import torch

from deltacontrol.theory.control.problem import ControlProblem, Controls, Cost, Dynamics, Residual
from deltacontrol.theory.errors import InputError
from tests.theory.dense import flat, kkt, unflatten
from tests.theory.problems import (
    CASES,
    Case,
    embedding_problem,
    forgetful_problem,
    normal,
    residual_network,
    scalar,
    varying,
)

F64 = torch.float64
by_name = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def autograd(problem: ControlProblem, controls: Controls) -> Controls:
    leaves = tuple(u.clone().requires_grad_() for u in controls)
    grads = torch.autograd.grad(problem.objective(leaves), leaves, allow_unused=True)
    return tuple(
        torch.zeros_like(u) if g is None else g for u, g in zip(leaves, grads, strict=True)
    )


def relative(a: Controls, b: Controls) -> float:
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


@by_name
def test_gradient_equals_autograd(case: Case) -> None:
    problem = case.make()
    controls = case.start(problem, 0.7)
    assert relative(problem.gradient(controls), autograd(problem, controls)) <= 1e-12


@by_name
def test_gradient_equals_central_differences_at_second_order(case: Case) -> None:
    problem = case.make()
    controls = case.start(problem, 0.7)
    direction = normal(flat(controls).numel(), seed=17)
    exact = float(flat(problem.gradient(controls)) @ direction)

    def error(h: float) -> float:
        ahead, behind = (
            problem.objective(unflatten(flat(controls) + s * h * direction, controls))
            for s in (1, -1)
        )
        return abs(float(ahead - behind) / (2 * h) - exact)

    scale = abs(exact) + 1.0
    assert error(1e-4) <= 1e-6 * scale
    if not case.linear_quadratic:
        rate = math.log2(error(2e-2) / error(1e-2))
        assert rate == pytest.approx(2.0, abs=0.1)


@by_name
def test_one_sweep_is_the_adjoint_of_the_linearised_rollout(case: Case) -> None:
    """``<p_L, dx_L/du v> = <(dx_L/du)' p_L, v>`` and the same at each step."""
    problem = case.make()
    controls = case.start(problem, 0.7)
    v = unflatten(normal(flat(controls).numel(), seed=18), controls)
    states = problem.rollout(controls)
    costates, gradient = problem.adjoint(states, controls)
    _, tangent = torch.func.jvp(problem.objective, (controls,), (v,))
    assert float(flat(gradient) @ flat(v)) == pytest.approx(float(tangent), rel=1e-12)
    for t in range(problem.dynamics.horizon):
        dx = normal(*states[t].shape, seed=19 + t)
        _, dH = torch.func.jvp(
            lambda x, u, t=t: problem.hamiltonian(t, x, u, costates[t + 1]),
            (states[t], controls[t]),
            (dx, v[t]),
        )
        pulled = (costates[t] * dx).sum() + (gradient[t] * v[t]).sum()
        assert float(pulled) == pytest.approx(float(dH), rel=1e-11, abs=1e-13)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.linear_quadratic], ids=lambda case: case.name
)
def test_costates_are_the_multipliers_of_the_dense_system(case: Case) -> None:
    problem = case.make()
    controls, multipliers = kkt(problem, case.per_example)
    assert problem.residual(controls).norm <= 1e-12
    costates = problem.costates(problem.rollout(controls), controls)
    for p, reference in zip(costates, multipliers, strict=True):
        torch.testing.assert_close(p, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case.exact], ids=lambda case: case.name)
def test_closed_form_is_stationary(case: Case) -> None:
    problem = case.make()
    assert case.exact is not None
    assert problem.residual(case.exact()).norm <= 1e-13


def test_scalar_problem_by_hand() -> None:
    problem = scalar()
    controls = tuple(torch.full((1,), float(t), dtype=F64) for t in range(5))
    now = problem.evaluate(controls)
    assert [float(x) for x in now.states] == [3, 3, 4, 6, 9, 13]
    assert [float(p) for p in now.costates] == [13] * 6
    assert float(now.objective) == 0.5 * (1 + 4 + 9 + 16) + 0.5 * 169
    assert [float(g) for g in now.gradient] == [13, 14, 15, 16, 17]
    residual = problem.residual(controls)
    assert residual.per_step == (13, 14, 15, 16, 17)
    assert residual.norm == pytest.approx(math.sqrt(13**2 + 14**2 + 15**2 + 16**2 + 17**2))


def test_costates_are_gradients_of_the_cost_to_go() -> None:
    problem = residual_network()
    controls = tuple(normal(3, seed=t) for t in range(5))
    states = problem.rollout(controls)
    costates = problem.costates(states, controls)
    for t, x in enumerate(states):

        def cost_to_go(x: torch.Tensor, t: int = t) -> torch.Tensor:
            total = x.new_zeros(())
            for s in range(t, problem.dynamics.horizon):
                total = total + problem.cost.running(s, x, controls[s])
                x = problem.dynamics.step(s, x, controls[s])
            return total + problem.cost.terminal(x)

        reference = torch.func.grad(cost_to_go)(x)
        torch.testing.assert_close(costates[t], reference, rtol=1e-12, atol=1e-14)


def test_integer_states_have_zero_costates() -> None:
    problem = embedding_problem()
    controls = tuple(normal(m, seed=m) for m in problem.dynamics.control_sizes)
    now = problem.evaluate(controls)
    assert [tuple(x.shape) for x in now.states] == [(3, 5), (3, 5, 4), (3, 5, 4), (3, 4)]
    assert now.costates[0].shape == (3, 5) and not now.costates[0].any()
    assert now.costates[0].is_floating_point()
    assert relative(now.gradient, autograd(problem, controls)) <= 1e-12


@pytest.mark.parametrize("per_example", [False, True])
def test_zero_controls_follow_the_problem(per_example: bool) -> None:
    tokens = embedding_problem()
    controls = tokens.zero_controls(per_example=per_example)
    lead = (3,) if per_example else ()
    assert [u.shape for u in controls] == [(*lead, 0), (*lead, 4), (*lead, 4)]
    assert controls[0].dtype == torch.get_default_dtype()
    assert residual_network().zero_controls()[0].dtype == F64
    shared, spread = (
        tokens.objective(tokens.zero_controls(per_example=choice, dtype=F64))
        for choice in (False, True)
    )
    torch.testing.assert_close(shared, spread)


def test_per_example_controls_with_equal_rows_are_the_shared_control() -> None:
    problem = varying(3)
    shared = tuple(normal(m, seed=m) for m in problem.dynamics.control_sizes)
    spread = tuple(u.expand(3, -1) for u in shared)
    torch.testing.assert_close(problem.objective(shared), problem.objective(spread))
    summed = tuple(g.sum(0) for g in problem.gradient(spread))
    assert relative(summed, problem.gradient(shared)) <= 1e-13


def test_steps_that_ignore_state_or_control_give_zeros() -> None:
    problem = forgetful_problem()
    controls = tuple(normal(2, seed=t) for t in range(4))
    now = problem.evaluate(controls)
    assert not now.costates[1].any() and not now.costates[0].any()
    assert not now.gradient[0].any() and not now.gradient[2].any()
    assert now.gradient[1].all() and now.gradient[3].all()
    assert relative(now.gradient, autograd(problem, controls)) <= 1e-15


class Constant(Cost):
    """A terminal cost that depends on nothing."""

    def terminal(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(())


def test_a_cost_that_depends_on_nothing_has_zero_gradients() -> None:
    problem = ControlProblem(residual_network().dynamics, Constant(), normal(7, 4, seed=0))
    assert problem.residual(problem.zero_controls()) == Residual((0.0,) * 5, 0.0)


def test_the_sweep_keeps_no_graph_and_works_without_grad_mode() -> None:
    problem = residual_network()
    controls = tuple(u.requires_grad_() for u in problem.zero_controls())
    with torch.no_grad():
        now = problem.evaluate(controls)
    for tensor in (*now.states, *now.costates, *now.gradient, now.objective):
        assert not tensor.requires_grad
    assert all(u.grad is None for u in controls)


def test_objective_works_under_vmap_and_grad() -> None:
    problem = residual_network()
    many = tuple(normal(8, 3, seed=t) for t in range(5))
    values = torch.func.vmap(problem.objective)(many)
    grads = torch.func.vmap(torch.func.grad(problem.objective))(many)
    for k in (0, 7):
        one = tuple(u[k] for u in many)
        torch.testing.assert_close(values[k], problem.objective(one), rtol=1e-13, atol=0)
        assert relative(tuple(g[k] for g in grads), problem.gradient(one)) <= 1e-13


def test_controls_per_example_need_a_batch_of_states() -> None:
    problem = varying(None)
    n, m = problem.x0.shape[0], problem.dynamics.control_sizes[0]
    u = list(problem.zero_controls(dtype=F64))
    u[0] = torch.zeros(n, m, dtype=F64)
    words = rf"step 0 has shape \({n}, {m}\).*state has shape \({n},\), without a batch axis"
    with pytest.raises(InputError, match=words):
        problem.rollout(tuple(u))
    with pytest.raises(InputError, match=rf"\({n},\), without a batch axis"):
        problem.zero_controls(per_example=True)


def test_shape_errors_name_both_shapes_and_the_step() -> None:
    problem = varying(6)
    controls = list(problem.zero_controls())
    with pytest.raises(InputError, match="expected 4 controls, one per step, but got 3"):
        problem.rollout(tuple(controls[:3]))
    controls[2] = torch.zeros(4, dtype=F64)
    with pytest.raises(InputError, match=r"step 2 has shape \(4,\); expected \(3,\).*\(6, 3\)"):
        problem.rollout(tuple(controls))
    controls[2] = torch.zeros(5, 3, dtype=F64)
    with pytest.raises(InputError, match=r"step 2 has shape \(5, 3\)"):
        problem.objective(tuple(controls))
    controls[2] = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(InputError, match="step 2 has dtype torch.int64"):
        problem.objective(tuple(controls))
    good = problem.zero_controls()
    with pytest.raises(InputError, match="expected 5 states"):
        problem.adjoint(problem.rollout(good)[:-1], good)
    with pytest.raises(InputError, match=r"p_3 has shape \(6, 3\).*step 2.*\(6, 2\)"):
        problem.hamiltonian(2, problem.rollout(good)[2], good[2], torch.zeros(6, 3, dtype=F64))


class Broken(Dynamics):
    """Its second step multiplies matrices that do not fit."""

    horizon = 2
    control_sizes = (1, 1)

    def step(self, t: int, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return x if t == 0 else x @ torch.zeros(9, 9)


def test_an_error_inside_a_step_is_located() -> None:
    problem = ControlProblem(Broken(), Constant(), torch.zeros(2, 3))
    with pytest.raises(RuntimeError) as caught:
        problem.rollout(problem.zero_controls())
    assert caught.value.__notes__ == ["in step 1, state (2, 3), control (1,)"]


def test_horizon_and_control_sizes_must_agree() -> None:
    class Wrong(Broken):
        control_sizes = (1,)

    with pytest.raises(InputError, match="horizon 2 but 1 control sizes"):
        ControlProblem(Wrong(), Constant(), torch.zeros(1))


def test_a_horizon_of_zero_leaves_the_terminal_cost() -> None:
    class Nothing(Broken):
        horizon = 0
        control_sizes = ()

    problem = ControlProblem(Nothing(), Constant(), torch.zeros(1))
    assert problem.evaluate(()).gradient == ()
    assert problem.residual(()) == Residual((), 0.0)
