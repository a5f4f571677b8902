"""Paths of a convex tuning and its exact reductions."""

from __future__ import annotations

import cvxpy as cp
import numpy as np
import pytest
import torch

from deltacontrol.theory.convex import ConvexStatus, ConvexTuning, GroupLasso, NormBall, Ridge
from tests.theory.convex_tunings import KINDS, SIZES, WEIGHTS, K, N, data, tuning
from tests.theory.problems import normal

# -- paths, largest weights, selection ---------------------------------------------------------


@pytest.mark.parametrize("penalty", ["lasso", "nuclear"])
@pytest.mark.parametrize("loss", ["cross-entropy", "squared-error"])
def test_largest_weight_is_sharp(penalty: str, loss: str) -> None:
    made = tuning(penalty, loss)
    top = made.largest_weight
    zero, little = made.solve(top), made.solve(0.995 * top)
    assert zero.active == () and all(not c.any() for c in zero.controls)
    assert zero.status is ConvexStatus.OPTIMAL and zero.solver == "none"
    assert little.active and little.objective < zero.objective - 2 * little.gap


@pytest.mark.parametrize(("penalty", "loss"), KINDS)
def test_path_is_monotone_and_equals_single_solves(penalty: str, loss: str) -> None:
    made = tuning(penalty, loss)
    selects = made.penalty.selects
    weights = made.grid(4, 0.05) if selects else [2.0, 0.5, 0.1]
    path = made.path(weights)
    assert [s.weight for s in path] == weights
    falls = np.diff([s.loss for s in path]) * (-1 if penalty == "ball" else 1)
    assert (falls <= 1e-9).all() and falls.min() < -1e-3
    if penalty != "ball":
        sizes = [(s.objective - s.loss) / s.weight for s in path]
        assert (np.diff(sizes) >= -1e-6).all()
    alone = made.solve(weights[1])
    assert alone.objective == pytest.approx(path[1].objective, abs=2e-7)


@pytest.mark.parametrize(("penalty", "loss"), KINDS)
def test_programs_are_parametrised(penalty: str, loss: str) -> None:
    made = tuning(penalty, loss)
    problem = made.program(WEIGHTS[penalty]).problem
    assert problem.is_dcp(dpp=True)
    assert len(problem.parameters()) == 3  # weight, offset and labels
    compiled = problem.get_problem_data("CLARABEL")[1]
    made.solve(0.7 * WEIGHTS[penalty])
    assert problem.get_problem_data("CLARABEL")[1] is compiled


def test_other_labels_reuse_the_program() -> None:
    made, other = tuning("lasso", "cross-entropy"), data("cross-entropy", seed=50)
    made.solve(0.02)
    again = made.with_labels(other["labels"], offset=other["offset"])
    vectors = normal(N, K, sum(SIZES), seed=7)
    fresh = ConvexTuning(vectors, groups=SIZES, penalty=GroupLasso(), **other)
    assert again._programs is made._programs
    assert again.solve(0.02).objective == pytest.approx(fresh.solve(0.02).objective, abs=1e-8)
    assert abs(again.solve(0.02).objective - made.solve(0.02).objective) > 0.01


def test_safe_zeros_are_zeros_of_the_exact_solution() -> None:
    """Also a rough certificate may only rule out what an accurate one does not use."""
    G = normal(30, 1, 40, seed=11)
    y = G[..., :4].sum(-1) + 0.1 * normal(30, 1, seed=12)
    made = ConvexTuning(G, y, groups=[2] * 20, loss="squared-error", penalty=GroupLasso())
    weight = 0.3 * made.largest_weight
    exact = made.solve(weight)
    assert exact.active[:2] == ("0", "1") and len(exact.active) < 12
    assert exact.ranks == exact.rank_bounds
    loose = ConvexTuning(
        G, y, groups=[2] * 20, loss="squared-error", penalty=GroupLasso(), tolerance=0.05
    ).solve(weight)
    assert all(e <= b for e, b in zip(exact.ranks, loose.rank_bounds, strict=True))
    for control, rank in zip(exact.controls, exact.ranks, strict=True):
        assert bool(control.any()) == bool(rank)


# -- exact reductions --------------------------------------------------------------------------


def test_rotation_changes_nothing() -> None:
    """Many more controls than rows: held against a program that knows no reduction."""
    sizes, options = (50, 70), data("cross-entropy")
    G = normal(N, K, sum(sizes), seed=13)
    for penalty, weight in ((GroupLasso(), 0.05), (Ridge(), 0.1), (NormBall(), 0.5)):
        found = ConvexTuning(G, groups=sizes, penalty=penalty, **options).solve(weight)
        u = cp.Variable(sum(sizes))
        z = options["offset"].numpy() + cp.reshape(
            G.reshape(N * K, -1).numpy() @ u, (N, K), order="C"
        )
        onehot = np.eye(K)[options["labels"].numpy()]
        loss = (cp.sum(cp.log_sum_exp(z, axis=1)) - cp.sum(cp.multiply(onehot, z))) / N
        parts = (u[:50], u[50:])
        terms = {
            GroupLasso: sum(
                weight * s**0.5 * cp.norm(p) for s, p in zip(sizes, parts, strict=True)
            ),
            Ridge: 0.5 * weight * cp.sum_squares(u),
            NormBall: 0.0,
        }
        limits = [cp.norm(u) <= weight] if isinstance(penalty, NormBall) else []
        plain = cp.Problem(cp.Minimize(loss + terms[type(penalty)]), limits)
        plain.solve(solver="CLARABEL")
        assert found.objective == pytest.approx(float(plain.value), abs=1e-7)
        np.testing.assert_allclose(torch.cat(found.controls).numpy(), u.value, atol=2e-4)
