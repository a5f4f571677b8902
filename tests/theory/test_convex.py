"""Convex delta-tuning: closed forms, other programs, certificates, mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deltacontrol.theory.control.costs import CrossEntropyCost
from deltacontrol.theory.control.problem import Box, ControlProblem
from deltacontrol.theory.control.systems import ResidualNetwork
from deltacontrol.theory.convex import (
    ConvexStatus,
    ConvexTuning,
    GroupLasso,
    NuclearNorm,
    OuterProducts,
    linearised_tuning,
    program,
)
from deltacontrol.theory.errors import InputError
from tests.theory.convex_tunings import F64, KINDS, SIZES, WEIGHTS, K, N, classes, data, tuning
from tests.theory.problems import normal

# -- closed forms ------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [5, 60])
def test_ridge_is_the_normal_equations(count: int) -> None:
    """``(G'G/N + lambda) u = G'(y - z)/N``, with fewer and with more controls than rows."""
    features = normal(N, K, count, seed=1)
    options = data("squared-error")
    solution = ConvexTuning(features, **options).solve(0.2)
    G = features.reshape(N * K, count)
    right = G.mT @ (options["labels"] - options["offset"]).reshape(-1) / N
    exact = torch.linalg.solve(G.mT @ G / N + 0.2 * torch.eye(count, dtype=F64), right)
    torch.testing.assert_close(solution.controls[0], exact, rtol=1e-7, atol=1e-8)
    assert solution.status is ConvexStatus.OPTIMAL and -1e-14 <= solution.gap < 1e-9


def orthonormal_features(count: int) -> Tensor:
    """``G'G = N I``, so that the least-squares solution is ``G'y/N``."""
    return N**0.5 * torch.linalg.qr(normal(N * K, count, seed=2))[0].reshape(N, K, count)


def test_group_lasso_is_soft_thresholding_of_groups() -> None:
    features = orthonormal_features(sum(SIZES))
    y = normal(N, K, seed=3)
    made = ConvexTuning(
        features, y, groups=SIZES, loss="squared-error", penalty=GroupLasso((1.0, 2.0, 0.5))
    )
    least = (features.reshape(N * K, -1).mT @ y.reshape(-1) / N).split(SIZES)
    weight = 0.6 * made.largest_weight
    solution = made.solve(weight)
    for found, c, w in zip(solution.controls, least, (1.0, 2.0, 0.5), strict=True):
        exact = (1 - weight * w / c.norm()).clamp(min=0) * c
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-7)
    expected = [int(c.norm() > weight * w) for c, w in zip(least, (1.0, 2.0, 0.5), strict=True)]
    assert 0 < sum(expected) < 3
    assert list(solution.ranks) == expected == list(solution.rank_bounds)


@pytest.mark.parametrize("direct", [32, 0])
def test_nuclear_norm_is_singular_value_thresholding(direct: int) -> None:
    p, q = 4, 6
    features = orthonormal_features(p * q).reshape(N, K, p, q)
    y = normal(N, K, seed=4)
    made = ConvexTuning(
        [features], y, loss="squared-error", penalty=NuclearNorm(direct=direct, directions=2)
    )
    C = torch.einsum("nkpq,nk->pq", features, y) / N
    left, values, right = torch.linalg.svd(C, full_matrices=False)
    assert made.largest_weight == pytest.approx(float(values[0]), rel=1e-12)
    weight = float(0.5 * (values[1] + values[2]))
    exact = left @ torch.diag((values - weight).clamp(min=0)) @ right
    solution = made.solve(weight)
    torch.testing.assert_close(solution.controls[0], exact, rtol=1e-4, atol=2e-4)
    assert solution.ranks == solution.rank_bounds == (2,)
    assert solution.objective == pytest.approx(
        float(0.5 * (y.reshape(-1) - features.reshape(N * K, -1) @ exact.reshape(-1)).square().sum()
              / N + weight * (values - weight).clamp(min=0).sum()), abs=1e-7
    )  # fmt: skip


def test_ridge_cross_entropy_is_logistic_regression() -> None:
    """Features of a linear head ``z = W h`` are ``e_k h'``; scikit-learn's C is 1/(lambda N)."""
    from sklearn.linear_model import LogisticRegression

    h, weight = normal(N, 40, seed=5), 0.01
    y = classes(N, K)
    left = torch.eye(K, dtype=F64).reshape(1, K, 1, K).expand(N, K, 1, K)
    made = ConvexTuning({"head": OuterProducts(left, h[:, None])}, y)  # pyright: ignore
    solution = made.solve(weight)
    reference = LogisticRegression(
        C=1 / (weight * N), fit_intercept=False, tol=1e-12, max_iter=9999
    )
    reference.fit(h.numpy(), y.numpy())
    np.testing.assert_allclose(solution.controls[0].numpy(), reference.coef_, atol=1e-6)
    np.testing.assert_allclose(solution.logits.numpy(), h.numpy() @ reference.coef_.T, atol=1e-5)


# -- optimality and certificates ---------------------------------------------------------------


@pytest.mark.parametrize(("penalty", "loss"), KINDS)
def test_certificate_closes(penalty: str, loss: str) -> None:
    solution = tuning(penalty, loss).solve(WEIGHTS[penalty])
    assert solution.status is ConvexStatus.OPTIMAL
    assert -1e-13 <= solution.gap <= 1e-7
    assert solution.rounds >= 1 and any(norm > 0.01 for norm in solution.norms)


@pytest.mark.parametrize(("penalty", "loss"), KINDS)
def test_objective_is_that_of_the_controls(penalty: str, loss: str) -> None:
    """Evaluated from scratch with the original features, and below random neighbours."""
    made, weight = tuning(penalty, loss), WEIGHTS[penalty]
    solution, options = made.solve(weight), data(loss)
    if penalty == "nuclear":
        G = [normal(N, K, 3, 4, seed=8), normal(N, K, 2, 3, seed=9)]
    else:
        G = list(normal(N, K, sum(SIZES), seed=7).split(SIZES, dim=-1))

    def objective(u: tuple[Tensor, ...]) -> float:
        pairs = zip(G, u, strict=True)
        z = options["offset"] + sum(g.flatten(2) @ c.reshape(-1) for g, c in pairs)
        y = options["labels"]
        value = (
            torch.nn.functional.cross_entropy(z, y)
            if loss == "cross-entropy"
            else 0.5 * (z - y).square().sum() / N
        )
        square = sum(c.square().sum() for c in u)
        if penalty in ("ridge", "box"):
            return float(value + 0.5 * weight * square)
        if penalty == "ball":
            return float(value)
        if penalty == "lasso":
            return float(value + weight * sum(len(c) ** 0.5 * c.norm() for c in u))
        return float(value + weight * sum(torch.linalg.matrix_norm(c, "nuc") for c in u))

    assert objective(solution.controls) == pytest.approx(solution.objective, abs=1e-9)
    for seed in range(20):
        moved = tuple(c + 0.05 * normal(*c.shape, seed=seed + 30) for c in solution.controls)
        if penalty == "box":
            moved = Box(-0.1, 0.2).project(moved)
        if penalty == "ball":
            length = sum(c.square().sum() for c in moved) ** 0.5
            moved = tuple(c * min(1.0, float(weight / length)) for c in moved)
        assert objective(moved) >= solution.bound - 1e-12


@pytest.mark.parametrize(("penalty", "loss"), KINDS)
def test_weak_duality_at_random_points(penalty: str, loss: str) -> None:
    made, weight = tuning(penalty, loss), WEIGHTS[penalty]
    best = made.solve(weight).objective
    y = made._targets
    finite = 0
    for seed in range(25):
        a = normal(N, K, seed=seed)
        if loss == "cross-entropy":
            a = torch.softmax(a, 1) - torch.from_numpy(y)
        for share in (1.0, 0.3, 0.02):
            bound = made.bound(share * a, weight)
            finite += bound > -np.inf
            assert bound <= best + 1e-9
    assert finite >= 10


def test_bound_is_minus_infinity_outside_the_domain() -> None:
    made = tuning("lasso", "cross-entropy")
    a = made.solve(0.06).dual
    assert made.bound(a, 0.06) > -np.inf
    assert made.bound(1.01 * a, 0.06) == -np.inf  # violates the constraint on v
    shifted = a.clone()
    shifted[0] = torch.tensor([2.0, -1.0, -1.0])  # not a distribution
    assert made.bound(1e-6 * a + shifted, 1e6) == -np.inf


def test_optimality_conditions_of_the_ball_and_the_box() -> None:
    for loss in ("cross-entropy", "squared-error"):
        ball = tuning("ball", loss).solve(0.4)
        G = normal(N, K, sum(SIZES), seed=7).reshape(N * K, -1)
        u = torch.cat(ball.controls)
        v = -G.mT @ ball.dual.reshape(-1) / N
        assert float(u.norm()) == pytest.approx(0.4, rel=1e-9)
        assert float(u @ v / (u.norm() * v.norm())) == pytest.approx(1.0, abs=1e-7)
        box = tuning("box", loss).solve(0.02)
        u = torch.cat(box.controls)
        v = -G.mT @ box.dual.reshape(-1) / N
        torch.testing.assert_close(u, (v / 0.02).clamp(-0.1, 0.2), rtol=1e-5, atol=1e-6)
        assert {-0.1, 0.2} <= {round(float(x), 6) for x in u}


def test_box_without_ridge_needs_two_finite_bounds() -> None:
    made = tuning("box", "squared-error")
    free = made.solve(0.0)
    assert free.status is ConvexStatus.OPTIMAL
    half = ConvexTuning(normal(N, K, 3, seed=1), box=Box(low=0.0), **data("squared-error"))
    assert half.solve(0.1).status is ConvexStatus.OPTIMAL
    with pytest.raises(InputError, match="0 only with a box"):
        half.solve(0.0)
    with pytest.raises(InputError, match="the box is empty"):
        Box(1.0, 0.0)


@pytest.mark.parametrize("name", ["clarabel", "scs"])
def test_solvers_agree(name: str) -> None:
    reference = tuning("lasso", "cross-entropy").solve(0.06)
    vectors, options = normal(N, K, sum(SIZES), seed=7), data("cross-entropy")
    made = ConvexTuning(vectors, groups=SIZES, penalty=GroupLasso(), solver=name, **options)
    found = made.solve(0.06)
    assert found.solver == name
    assert abs(found.objective - reference.objective) <= found.gap + reference.gap
    assert found.gap < 1e-5


def test_osqp_solves_the_quadratic_program() -> None:
    vectors, options = normal(N, K, sum(SIZES), seed=7), data("squared-error")
    made = ConvexTuning(vectors, solver="osqp", box=Box(-0.1, 0.2), **options)
    found = made.solve(0.02)
    assert found.solver == "osqp" and found.gap < 1e-6


def test_an_inaccurate_solve_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(program._TIGHT, "SCS", {"max_iters": 8, "eps_abs": 1e-9})
    vectors, options = normal(N, K, sum(SIZES), seed=7), data("cross-entropy")
    made = ConvexTuning(vectors, groups=SIZES, penalty=GroupLasso(), solver="scs", **options)
    rough = made.solve(0.06)
    exact = tuning("lasso", "cross-entropy").solve(0.06)
    assert rough.status is ConvexStatus.INACCURATE
    assert rough.bound <= exact.objective <= rough.objective
    assert rough.gap > 1e-5


# -- mistakes ----------------------------------------------------------------------------------

GOOD = {"features": normal(4, 3, 6, seed=70), "labels": torch.tensor([0, 1, 2, 0])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 3, 0])}, "labels are in"),
        ({"labels": torch.tensor([0, 1, 2])}, "4 class numbers"),
        ({"labels": torch.tensor([0.0, 1.0, 2.0, 0.0])}, "squared-error"),
        ({"labels": torch.zeros(4, 2), "loss": "squared-error"}, "real targets"),
        ({"labels": torch.full((4, 3), torch.nan), "loss": "squared-error"}, "finite real"),
        ({"features": normal(4, 3, 0, seed=70)}, "no controls"),
        ({"loss": "hinge"}, "unknown loss"),
        ({"groups": (2, 3)}, "5 controls in all"),
        ({"features": normal(4, 6, seed=70)}, "examples, logits"),
        ({"features": GOOD["features"] * torch.inf}, "finite"),
        ({"features": []}, "at least one group"),
        ({"features": [GOOD["features"], normal(3, 3, 2, seed=1)]}, "3 examples"),
        ({"features": [GOOD["features"]], "groups": (6,)}, "single tensor"),
        ({"offset": torch.zeros(3, 4)}, "offset"),
        ({"penalty": GroupLasso((1.0, 1.0))}, "1 positive numbers"),
        ({"penalty": NuclearNorm()}, "needs matrices"),
        ({"penalty": GroupLasso(), "box": Box(0.0, 1.0)}, "goes with Ridge"),
        ({"memory_limit": 100}, "OuterProducts"),
        ({"solver": "mosek"}, "unknown solver"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ConvexTuning(**(GOOD | change)).solve(1.0)  # pyright: ignore


def test_mistakes_in_use_are_named() -> None:
    made = ConvexTuning(**GOOD)  # pyright: ignore
    with pytest.raises(InputError, match="the weight is -1"):
        made.solve(-1.0)
    with pytest.raises(InputError, match="GroupLasso and NuclearNorm have"):
        _ = made.largest_weight
    with pytest.raises(InputError, match="the dual has shape"):
        made.bound(torch.zeros(3), 1.0)
    with pytest.raises(InputError, match="left factors"):
        OuterProducts(np.zeros((4, 3, 2, 5)), np.zeros((4, 3, 6)))
    network = ResidualNetwork.random(2, width=3, hidden=3, control_size=2)
    problem = ControlProblem(network, CrossEntropyCost(classes(4, 3)), normal(4, 3, seed=1))
    with pytest.raises(InputError, match="shared ones"):
        linearised_tuning(problem, problem.zero_controls(per_example=True))
