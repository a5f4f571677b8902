"""Gramians against dense algebra, least energies against least squares, sketches at their rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.problem import ControlProblem, Controls
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.linearisation import Linearisation
from deltacontrol.theory.linear.operator import SymmetricMatrix
from deltacontrol.theory.linear.output_map import OutputMap, linear_quadratic_gain
from deltacontrol.theory.linear.reachability import Reachability
from deltacontrol.theory.linear.sketching import hutchpp, leading_spectrum
from tests.theory.dense import flat
from tests.theory.problems import CASES, F64, Case, Embedding, embedding_problem, normal, scalar

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def linearised(case: Case) -> Linearisation:
    problem = case.make()
    return Linearisation.of(problem, case.start(problem, scale=0.5), keep=True)


def jacobians(lin: Linearisation, t: int) -> tuple[Tensor, Tensor]:
    """Dense ``A_t`` and ``B_t`` of the flat states, by reverse mode."""
    x, u = lin.states[t], lin.controls[t]
    step = lin.dynamics.step
    rows = lin.states[t + 1].numel()
    b = torch.func.jacrev(lambda u: step(t, x, u))(u).reshape(rows, u.numel())
    if not x.is_floating_point():
        return b.new_zeros(rows, x.numel()), b
    return torch.func.jacrev(lambda x: step(t, x, u))(x).reshape(rows, x.numel()), b


def dense_map(lin: Linearisation, stage: int) -> list[Tensor]:
    """``Phi_t B_t`` from the Jacobians of the steps, multiplied out."""
    blocks = []
    phi = torch.eye(lin.states[stage].numel(), dtype=F64)
    for t in reversed(range(stage)):
        a, b = jacobians(lin, t)
        blocks.append(phi @ b)
        phi = phi @ a
    return blocks[::-1]


def close(found: Tensor, expected: Tensor, tol: float = 1e-10) -> bool:
    return bool((found - expected).norm() <= tol * expected.norm().clamp_min(1e-12))


@each_case
def test_gramian_equals_the_dense_one(case: Case) -> None:
    lin = linearised(case)
    for stage in range(1, lin.horizon + 1):
        reach = Reachability(lin, stage)
        blocks = dense_map(lin, stage)
        expected = torch.stack([b @ b.mT for b in blocks]).sum(0)
        found = reach.output_map()
        assert close(found.gramian(), expected)
        for t, b in enumerate(blocks):
            assert close(found.gramian({t: slice(None)}), b @ b.mT)
        assert not any(float(block.norm()) for block in found.blocks[stage:])
        q = normal(*reach.output.shape, seed=1)
        assert close(reach.gramian @ q.flatten(), expected @ q.flatten())


@each_case
def test_access_weighs_and_switches_off(case: Case) -> None:
    lin = linearised(case)
    access = [normal(*u.shape, seed=t).square() for t, u in enumerate(lin.controls)]
    access[0] = torch.zeros_like(access[0])
    reach = Reachability(lin, access=access)
    blocks = dense_map(lin, lin.horizon)
    weighted = [b * a.flatten() for b, a in zip(blocks, access, strict=True)]
    expected = torch.stack([w @ b.mT for w, b in zip(weighted, blocks, strict=True)]).sum(0)
    assert close(reach.output_map().gramian(), expected)
    last = lin.horizon - 1
    part = {last: slice(0, 1)}
    expected = weighted[last][:, :1] @ blocks[last][:, :1].mT
    q = normal(*reach.output.shape, seed=1)
    narrow = reach.restricted(part)
    assert close(narrow.gramian @ q.flatten(), expected @ q.flatten())
    assert close(reach.output_map().gramian(part), expected)
    assert close(narrow.output_map().gramian(), expected)


@each_case
def test_least_energy_is_the_least_norm_solution(case: Case) -> None:
    lin = linearised(case)
    reach = Reachability(lin)
    C = torch.cat(dense_map(lin, lin.horizon), dim=1)
    y = normal(*reach.output.shape, seed=3)
    expected = np.linalg.lstsq(C.numpy(), y.flatten().numpy(), rcond=None)[0]
    found = reach.output_map().minimum_energy(y)
    assert close(flat(found.control), torch.from_numpy(expected), 1e-9)
    assert found.energy == pytest.approx(0.5 * float((expected**2).sum()), rel=1e-9)
    assert sum(found.per_step) == pytest.approx(found.energy, rel=1e-12)
    assert close(reach @ flat(found.control) + found.unreachable.flatten(), y.flatten(), 1e-9)
    # The unreachable part is orthogonal to everything that a control reaches.
    assert float((C.mT @ found.unreachable.flatten()).norm()) <= 1e-9 * float(y.norm())


def test_weighted_least_energy_solves_the_kkt_system() -> None:
    """``R du = C' q``, ``C du = y``: one dense system in (du, q)."""
    case = next(c for c in CASES if c.name == "varying")
    lin = linearised(case)
    access = [normal(*u.shape, seed=t).square() + 0.1 for t, u in enumerate(lin.controls)]
    C = torch.cat(dense_map(lin, lin.horizon), dim=1)
    n, m = C.shape
    R = torch.diag(1 / torch.cat(access))
    y = normal(n, seed=4)
    K = torch.cat([torch.cat([R, -C.mT], 1), torch.cat([C, torch.zeros(n, n, dtype=F64)], 1)])
    solution = torch.linalg.solve(K, torch.cat([torch.zeros(m, dtype=F64), y]))
    found = Reachability(lin, access=access).output_map().minimum_energy(y)
    assert close(flat(found.control), solution[:m])
    assert close(found.multiplier, solution[m:])
    assert found.energy == pytest.approx(0.5 * float(solution[:m] @ R @ solution[:m]), rel=1e-10)
    assert float(found.unreachable.norm()) <= 1e-10


def test_scalar_closed_form() -> None:
    """``x_L = x_0 + sum u_t``: ``W = L``, energy ``y^2/(2L)``, each control ``y/L``."""
    problem = scalar()
    horizon = problem.dynamics.horizon
    lin = Linearisation.of(problem, problem.zero_controls())
    reach = Reachability(lin)
    y = torch.tensor([2.0], dtype=F64)
    found = reach.output_map().minimum_energy(y)
    assert float(reach.gramian @ torch.ones(1, dtype=F64)) == horizon
    assert found.energy == pytest.approx(4 / (2 * horizon), rel=1e-14)
    assert torch.allclose(flat(found.control), torch.full((horizon,), 2 / horizon, dtype=F64))
    assert hutchpp(Reachability(lin, stage=2).gramian, 10).value == pytest.approx(2.0)


def test_unreachable_targets_are_named() -> None:
    """A control that acts along (1, 0) alone reaches nothing along (0, 1)."""
    from deltacontrol.theory.control.costs import SquaredErrorCost
    from deltacontrol.theory.control.systems import LinearDynamics

    A, B = torch.eye(2, dtype=F64), torch.tensor([[2.0], [0.0]], dtype=F64)
    problem = ControlProblem(
        LinearDynamics.constant(3, A, B),
        SquaredErrorCost(torch.zeros(2, dtype=F64)),
        torch.zeros(2, dtype=F64),
    )
    reach = Reachability(Linearisation.of(problem, problem.zero_controls()))
    y = torch.tensor([6.0, 5.0], dtype=F64)
    exact = reach.output_map().minimum_energy(y)
    assert torch.allclose(exact.unreachable, torch.tensor([0.0, 5.0], dtype=F64), atol=1e-13)
    assert exact.energy == pytest.approx(0.5 * 36 / 12, rel=1e-13)
    for nothing in ({}, {1: slice(0, 0)}):
        idle = reach.output_map().minimum_energy(y, nothing)
        assert idle.energy == 0.0 and torch.equal(idle.unreachable, y)
    damped = reach.minimum_energy(y, damping=1e-9)
    assert torch.allclose(damped.unreachable, exact.unreachable, atol=1e-7)


def test_damped_energy_rises_to_the_exact_one_in_proportion_to_the_damping() -> None:
    lin = linearised(next(c for c in CASES if c.name == "double-integrator"))
    reach = Reachability(lin)
    y = normal(2, seed=6)
    exact = reach.output_map().minimum_energy(y).energy
    gaps = []
    for damping in (1e-3, 1e-4):
        found = reach.minimum_energy(y, damping=damping, tol=1e-13)
        W = reach.output_map().gramian()
        q = torch.linalg.solve(W + damping * torch.eye(2, dtype=F64), y)
        assert found.converged and found.num_products <= 3
        assert close(found.multiplier, q)
        gaps.append(exact - found.energy)
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.01)
    stopped = reach.minimum_energy(y, damping=1e-3, max_steps=1)
    assert not stopped.converged


def test_a_shared_control_couples_the_examples() -> None:
    """Shared: ``W_ij = C_i C_j'`` for all i, j. One control an example: the diagonal blocks."""
    case = next(c for c in CASES if c.name == "residual")
    problem = case.make()
    shared = case.start(problem, scale=0.5)
    batch, width = problem.x0.shape
    own = tuple(u.expand(batch, -1).contiguous() for u in shared)

    def gramian(u: Controls) -> Tensor:
        W = Reachability(Linearisation.of(problem, u, keep=True)).output_map().gramian()
        return W.reshape(batch, width, batch, width)

    ensemble, single = gramian(shared), gramian(own)
    for i in range(batch):
        assert close(single[i, :, i], ensemble[i, :, i])
        for j in range(batch):
            assert i == j or float(single[i, :, j].norm()) == 0.0
    assert float(ensemble[0, :, 1].norm()) > 1e-3
    # Moving all examples together costs more than moving each by its own control.
    y = normal(batch, width, seed=8)
    energies = [
        Reachability(Linearisation.of(problem, u, keep=True)).output_map().minimum_energy(y).energy
        for u in (shared, own)
    ]
    assert energies[0] > energies[1]


def test_the_ensemble_is_the_stack_of_its_examples() -> None:
    case = next(c for c in CASES if c.name == "classifier")
    problem = case.make()
    u = case.start(problem, scale=0.5)
    whole = Reachability(Linearisation.of(problem, u, keep=True)).output_map()
    singles = []
    for i in range(problem.x0.shape[0]):
        alone = ControlProblem(problem.dynamics, problem.cost, problem.x0[i : i + 1])
        singles.append(Reachability(Linearisation.of(alone, u, keep=True)).output_map())
    stacked = OutputMap.stack(singles)
    assert close(stacked.weighted(), whole.weighted())
    assert close(stacked @ flat(u), whole @ flat(u))


def test_functionals_and_chunks() -> None:
    problem = embedding_problem()
    assert isinstance(problem.dynamics, Embedding)
    lin = Linearisation.of(problem, problem.zero_controls(dtype=F64), keep=True)
    reach = Reachability(lin)
    K = normal(2, *reach.output.shape, seed=1)
    whole = reach.output_map()
    part = Reachability(lin, chunk=1).output_map(K)
    assert close(part.weighted(), K.flatten(1) @ whole.weighted())
    assert close(Reachability(lin, chunk=2).output_map().gramian(), whole.gramian())


def test_the_gain_is_the_minimum_of_the_quadratic_model() -> None:
    C, g, root = normal(4, 9, seed=1), normal(4, seed=2), normal(4, 3, seed=3)
    H, decay = root @ root.mT, 0.3
    du = -torch.linalg.solve(decay * torch.eye(9, dtype=F64) + C.mT @ H @ C, C.mT @ g)
    y = C @ du
    loss = float(g @ y + 0.5 * y @ H @ y)
    found = linear_quadratic_gain(C @ C.mT, g, H, decay)
    assert close(found.output, y)
    assert found.energy == pytest.approx(0.5 * float(du @ du), rel=1e-11)
    assert found.loss_drop == pytest.approx(-loss, rel=1e-11)
    assert found.objective_drop == pytest.approx(-loss - decay * found.energy, rel=1e-11)


def symmetric(values: Tensor, seed: int = 0) -> Tensor:
    basis = torch.linalg.qr(normal(len(values), len(values), seed=seed))[0]
    return basis * values @ basis.mT


def test_subspace_iteration_has_its_rate() -> None:
    """Each product multiplies the error of eigenvalue j by (lambda_{b+1}/lambda_j)^2."""
    values = 0.9 ** torch.arange(60, dtype=F64)
    W = symmetric(values)
    wanted, extra = 4, 4
    errors = []
    for iterations in (0, 1, 2, 3):
        of_seeds = []
        for seed in range(20):
            found = leading_spectrum(
                SymmetricMatrix(W), wanted, oversampling=extra, iterations=iterations,
                seed=seed,
            )  # fmt: skip
            gap = values[:wanted] - found.values
            assert bool((gap >= -1e-13).all()), "a Ritz value is not above its eigenvalue"
            nearest = (values[None] - found.values[:, None]).abs().min(1).values
            assert bool((nearest <= found.residuals + 1e-13).all())
            assert found.missed >= float(values[wanted + extra])
            of_seeds.append(gap[0].clamp_min(1e-300).log())
        errors.append(float(torch.stack(of_seeds).mean()))
    slope = np.polyfit(range(4), errors, 1)[0]
    assert slope == pytest.approx(2 * math.log(0.9 ** (wanted + extra)), rel=0.15)


def test_spectrum_of_a_rollout() -> None:
    lin = linearised(next(c for c in CASES if c.name == "residual"))
    reach = Reachability(lin)
    exact = torch.linalg.eigvalsh(reach.output_map().gramian()).flip(0)
    chunked = Reachability(lin, chunk=5)
    found = leading_spectrum(chunked.gramian, 3, iterations=25)
    assert close(found.values, exact[:3], 1e-9)
    assert float(found.residuals.max()) <= 1e-6 * float(exact[0])
    assert close(found.vectors @ found.vectors.mT, torch.eye(3, dtype=F64))
    assert hutchpp(chunked.gramian, 10**6).value == pytest.approx(float(exact.sum()), rel=1e-12)


@pytest.mark.slow
def test_hutchpp_is_exact_for_low_rank_unbiased_and_has_its_rate() -> None:
    low = symmetric(torch.cat([normal(8, seed=1).square() + 0.1, torch.zeros(52, dtype=F64)]))
    found = hutchpp(SymmetricMatrix(low), 24)
    assert found.value == pytest.approx(float(low.trace()), rel=1e-10)
    assert found.num_products == 24
    # With eigenvalues 1/j the deviation falls at least as fast as 1/products (theorem 1).
    W = symmetric(1 / torch.arange(1, 401, dtype=F64))
    exact, deviations = float(W.trace()), []
    for products in (24, 48, 96):
        runs = [hutchpp(SymmetricMatrix(W), products, seed=s) for s in range(200)]
        values = np.array([r.value for r in runs])
        assert abs(values.mean() - exact) <= 4 * values.std() / math.sqrt(len(values))
        claimed = math.sqrt(float(np.mean([r.standard_error**2 for r in runs])))
        assert claimed == pytest.approx(values.std(), rel=0.25)
        deviations.append(values.std())
    assert deviations[0] / deviations[2] >= 4 * 0.8


def test_wrong_arguments_are_refused() -> None:
    lin = linearised(CASES[0])
    with pytest.raises(InputError, match="stage is 9; expected 1 to 5"):
        Reachability(lin, 9)
    with pytest.raises(InputError, match="one per step"):
        Reachability(lin, access=[1.0])
    with pytest.raises(InputError, match="negative"):
        Reachability(lin, access=[-1.0] * 5)
    with pytest.raises(InputError, match=r"shape \(3,\)"):
        Reachability(lin, access=[torch.ones(3, dtype=F64)] * 5)
    reach = Reachability(lin)
    with pytest.raises(InputError, match="step 7"):
        reach.restricted({7: slice(None)})
    with pytest.raises(InputError, match="one output a row"):
        reach.output_map(torch.ones(2, 3, dtype=F64))
    with pytest.raises(InputError, match="hence 2 entries; expected 1"):
        reach.output_map().minimum_energy(torch.ones(2, dtype=F64))
    with pytest.raises(InputError, match="damping"):
        reach.minimum_energy(torch.ones(1, dtype=F64), damping=0.0)
    with pytest.raises(InputError, match="num_values"):
        leading_spectrum(reach.gramian, 4)
    with pytest.raises(InputError, match="at least one"):
        OutputMap.stack([])
    other = Reachability(lin, access=[2.0] * 5).output_map()
    with pytest.raises(InputError, match="access"):
        OutputMap.stack([reach.output_map(), other])
    one = torch.ones(1, 1, dtype=F64)
    with pytest.raises(InputError, match="weight_decay"):
        linear_quadratic_gain(one, one[0], one, 0.0)
    with pytest.raises(InputError, match="do not fit"):
        linear_quadratic_gain(one, one, one, 1.0)
    with pytest.raises(InputError, match="6"):
        hutchpp(SymmetricMatrix(torch.eye(60)), 3)
