"""Outputs after training in random directions: exact solves over many draws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.dimension.subspace_outputs import LinearisedRows, eliminate
from deltacontrol.theory.errors import InputError

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def rows(Z: Tensor, T: Tensor, s: Tensor, f: Tensor) -> LinearisedRows:
    return LinearisedRows(Z @ Z.mT, s, f, T @ Z.mT, T @ T.mT)


N, M, D = 60, 3, 200
Z = normal(N, D, seed=1) * torch.arange(1, N + 1, dtype=F64)[:, None] ** -0.5
T, S, F = normal(M, D, seed=2), normal(N, seed=3), normal(M, seed=4)


def trained(d: int, seed: int) -> Tensor:
    P = normal(D, d, seed=seed)
    ZP = Z @ P
    return F - T @ P @ torch.linalg.solve(ZP.mT @ ZP, ZP.mT @ S)


def test_mean_and_covariance_are_those_of_exact_solves() -> None:
    problem, d, draws = rows(Z, T, S, F), 25, 3000
    mean, covariance = problem.trained(problem.loss.kappa(d))
    found = torch.stack([trained(d, 100 + seed) for seed in range(draws)])
    spread = found.var(0)
    # Formulas of leading order: in 60 rows a relative error of about 1/25 remains.
    error = 4 * (spread / draws).sqrt() + 0.04 * (mean - F).abs()
    assert bool(((found.mean(0) - mean).abs() < error).all())
    relative = (found.T.cov() - covariance).norm() / covariance.norm()
    assert float(relative) < 4 * math.sqrt(2 / draws) + 1.5 / 25


def test_its_own_rows_see_the_fall_of_the_loss() -> None:
    """For T = Z the mean of the fall, from mean and covariance, is that of the ridge formula."""
    problem = rows(Z, Z, S, torch.zeros(N, dtype=F64))
    kappa = problem.loss.kappa(30)
    mean, covariance = problem.trained(kappa)
    loss = 0.5 * (mean.square().sum() + covariance.trace()) + S @ mean
    assert float(-loss) == pytest.approx(problem.loss.fall(kappa), rel=1e-9)


def test_the_dual_gives_the_mean_of_the_parameters() -> None:
    problem = rows(Z, T, S, F)
    A = torch.linalg.inv(Z.mT @ Z + 0.3 * torch.eye(D, dtype=F64))
    torch.testing.assert_close(Z.mT @ problem.dual(0.3), A @ Z.mT @ S, rtol=1e-10, atol=1e-12)
    g = Z.mT @ S
    factor = 0.3 * (g @ A @ A @ g) / (A @ Z.mT @ Z @ A).trace()
    mean, covariance = problem.trained(0.3)
    torch.testing.assert_close(mean, F - T @ A @ g, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(covariance, factor * T @ A @ A @ T.mT, rtol=1e-8, atol=1e-10)


def test_parameters_that_are_free_are_answered_exactly() -> None:
    Y, Q = normal(N, 7, seed=5), normal(M, 7, seed=6)
    reduced = eliminate(rows(Z, T, S, F), rows(Y, Q, S, F))
    P = normal(D, 12, seed=7)
    both, seen = torch.cat([Z @ P, Y], 1), torch.cat([T @ P, Q], 1)
    exact = -torch.linalg.lstsq(both, S[:, None]).solution[:, 0]
    pinv = torch.linalg.pinv(Y)
    project = torch.eye(N, dtype=F64) - Y @ pinv
    inner, outer = project @ Z, T - Q @ pinv @ Z
    torch.testing.assert_close(reduced.kernel, inner @ inner.mT, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(reduced.cross, outer @ inner.mT, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(reduced.own, outer @ outer.mT, rtol=1e-9, atol=1e-10)
    z = -torch.linalg.lstsq(inner @ P, reduced.residual[:, None]).solution[:, 0]
    torch.testing.assert_close(z, exact[:12], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(reduced.outputs + outer @ P @ z, F + seen @ exact, atol=1e-8, rtol=0)


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match="cross has shape"):
        LinearisedRows(Z @ Z.mT, S, F, Z @ Z.mT, T @ T.mT)
