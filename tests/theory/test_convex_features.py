"""Features of convex delta-tuning: factored, dense, of linearised dynamics."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch

from deltacontrol.theory.control.costs import CrossEntropyCost, SquaredErrorCost
from deltacontrol.theory.control.problem import ControlProblem
from deltacontrol.theory.control.systems import LinearDynamics, ResidualNetwork
from deltacontrol.theory.convex import (
    ConvexTuning,
    DenseFeatures,
    GroupLasso,
    NuclearNorm,
    OuterProducts,
    Ridge,
    linearised_tuning,
    logit_jacobians,
)
from deltacontrol.theory.convex.features import contrasts
from deltacontrol.theory.convex.penalties import Penalty
from deltacontrol.theory.solvers import Shooting, solve
from tests.theory.convex_tunings import K, N, classes, data
from tests.theory.problems import normal


def outer_products(num_tokens: int, p: int, q: int, seed: int) -> OuterProducts:
    left = normal(N, K, num_tokens, p, seed=seed).numpy()
    left[:, :, -1] = 0.0  # padding
    return OuterProducts(left, normal(N, num_tokens, q, seed=seed + 1).numpy())


def test_outer_products_are_the_dense_features() -> None:
    factored = outer_products(4, 5, 6, seed=20)
    array = np.einsum("nktp,ntq->nkpq", factored.left, factored.right)
    dense = DenseFeatures(array)
    W, a = normal(30, seed=22), normal(N * K, seed=23)
    left, right = (np.linalg.qr(normal(m, 3, seed=24).numpy())[0] for m in (5, 6))
    C = contrasts(K)
    for one, two in (
        (factored @ W, dense @ W),
        (factored.T @ a, dense.T @ a),
        (factored.kernel(), dense.kernel()),
        (factored.restrict(left, right).array, dense.restrict(left, right).array),
        (factored.contrasted(C).kernel(), dense.contrasted(C).kernel()),
    ):
        np.testing.assert_allclose(one, two, rtol=1e-10, atol=1e-10)
    assert factored.frobenius() == pytest.approx(dense.frobenius(), rel=1e-12)
    assert float((dense @ W) @ a) == pytest.approx(float(W @ (dense.T @ a)))


def test_contrasts_keep_all_but_the_mean() -> None:
    C, z = contrasts(K), normal(N, K, seed=25).numpy()
    np.testing.assert_allclose(C.T @ C, np.eye(K - 1), atol=1e-14)
    np.testing.assert_allclose(z @ C @ C.T, z - z.mean(1, keepdims=True), atol=1e-14)


def test_kernel_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltacontrol.theory.convex import features

    factored = outer_products(4, 5, 6, seed=20)
    whole = factored.kernel()
    monkeypatch.setattr(features, "_STRETCH_NUMBERS", 1)
    np.testing.assert_allclose(factored.kernel(), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", [GroupLasso(), Ridge()])
def test_factored_and_dense_features_give_the_same(penalty: Penalty) -> None:
    """By the kernel where features are factored, by rotation where they are dense."""
    one, two = outer_products(4, 9, 8, seed=30), outer_products(3, 7, 9, seed=40)
    dense = [DenseFeatures(np.einsum("nktp,ntq->nkpq", f.left, f.right)) for f in (one, two)]
    options = data("cross-entropy")
    weight = 0.02
    a = ConvexTuning([one, two], penalty=penalty, **options).solve(weight)
    b = ConvexTuning(dense, penalty=penalty, **options).solve(weight)
    assert a.objective == pytest.approx(b.objective, abs=1e-9)
    for x, y in zip(a.controls, b.controls, strict=True):
        assert x.norm() > 0.01
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_two_sided_projection_and_growing_bases_are_exact() -> None:
    """12 examples of one token: rank 12 of 40 x 30; bases that grow against the whole program."""
    left, right = normal(N, 1, 1, 40, seed=50), normal(N, 1, 30, seed=51)
    features, y = OuterProducts(left, right), normal(N, 1, seed=52)  # pyright: ignore
    options = {"loss": "squared-error", "tolerance": 1e-8}
    weight = 0.4 * ConvexTuning([features], y, penalty=NuclearNorm(), **options).largest_weight
    whole = ConvexTuning([features], y, penalty=NuclearNorm(), **options).solve(weight)
    grown = ConvexTuning(
        [features], y, penalty=NuclearNorm(direct=0, directions=2), **options
    ).solve(weight)
    assert whole.rounds == 1 and grown.rounds > 1
    assert whole.objective == pytest.approx(grown.objective, abs=2e-8)
    assert whole.ranks == grown.ranks and 1 <= whole.ranks[0] < 12
    W, X = cp.Variable((40, 30)), np.einsum("np,nq->npq", left[:, 0, 0], right[:, 0])
    z = X.reshape(N, -1) @ cp.vec(W, order="C")
    plain = cp.Problem(
        cp.Minimize(0.5 * cp.sum_squares(z - y[:, 0].numpy()) / N + weight * cp.normNuc(W))
    )
    plain.solve(solver="SCS", eps=1e-6)
    assert whole.objective == pytest.approx(float(plain.value), abs=1e-4)


# -- from a control problem --------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cross-entropy", "squared-error"])
def test_linear_dynamics_are_their_own_linearisation(loss: str) -> None:
    """Ridge of weight lambda solves the control problem with that weight decay."""
    dynamics = LinearDynamics(
        A=[0.6 * normal(4, 3, seed=60), 0.6 * normal(3, 4, seed=61)],
        B=[normal(4, 2, seed=62), normal(3, 3, seed=63)],
    )
    labels = torch.tensor([0, 2, 1, -100, 2])
    cost = (
        CrossEntropyCost(labels, weight_decay=0.2)
        if loss == "cross-entropy"
        else SquaredErrorCost(normal(5, 3, seed=64), weight_decay=0.2)
    )
    problem = ControlProblem(dynamics, cost, normal(5, 3, seed=65))
    start = problem.zero_controls()
    exact = solve(problem, Shooting(), start, max_steps=500, tol=1e-10)
    found = linearised_tuning(problem, start).solve(0.2)
    assert found.objective == pytest.approx(exact.objective, abs=1e-9)
    for x, y in zip(found.controls, exact.controls, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_jacobians_of_the_logits_are_autograd_s() -> None:
    dynamics = ResidualNetwork.random(3, width=4, hidden=6, control_size=2, seed=1)
    problem = ControlProblem(dynamics, CrossEntropyCost(classes(5, 4)), normal(5, 4, seed=2))
    u = tuple(0.1 * normal(2, seed=s) for s in (3, 4, 5))
    found = logit_jacobians(problem, u, chunk=7)
    wanted = torch.func.jacrev(lambda *u: problem.rollout(u)[-1], argnums=(0, 1, 2))(*u)
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
