"""Lanczos quadrature against dense eigendecompositions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.krylov import quadrature, spectral_density
from deltacontrol.theory.linear.operator import Diagonal, SymmetricMatrix

F64 = torch.float64


def operator(values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n = len(values)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))
    return basis @ torch.diag(values) @ basis.T, basis


def spread(n: int) -> Tensor:
    return torch.logspace(2, -6, n, dtype=F64)


def test_a_full_run_is_exact_for_every_function() -> None:
    values = spread(24)
    W, basis = operator(values)
    v = torch.randn(3, 24, generator=torch.Generator().manual_seed(1), dtype=F64)
    rule = quadrature(SymmetricMatrix(W), v, 24)
    for f in (torch.exp, lambda x: x / (x + 0.1), lambda x: (x > 1).to(F64)):
        scaled = (lambda x, f=f: f(x / 100)) if f is torch.exp else f
        exact = ((v @ basis).square() * scaled(values)).sum(1)
        torch.testing.assert_close(rule.form(scaled), exact, rtol=1e-9, atol=1e-9)
    assert rule.num_products == 3 * 24


@pytest.mark.parametrize("m", [1, 2, 5])
def test_m_nodes_are_exact_for_polynomials_of_degree_2m_minus_1(m: int) -> None:
    values = torch.linspace(-1, 2, 20, dtype=F64)
    W, basis = operator(values)
    v = torch.randn(1, 20, generator=torch.Generator().manual_seed(1), dtype=F64)
    rule = quadrature(SymmetricMatrix(W), v, m)
    share = (v @ basis).square()

    def difference(power: int) -> float:
        exact = (share * values**power).sum()
        return float(abs(rule.form(lambda x: x**power)[0] - exact) / share.sum())

    assert max(difference(power) for power in range(2 * m)) < 1e-12
    assert difference(2 * m) > 1e-6


def test_rows_whose_krylov_space_ends_early_keep_their_measure() -> None:
    values = torch.tensor([3.0, 3.0, 1.0, 0.0, 0.0, 0.0], dtype=F64)
    W, basis = operator(values)
    v = torch.stack([basis[:, 0] + basis[:, 1], basis.sum(1), basis[:, 4]])
    rule = quadrature(SymmetricMatrix(W), v, 6)
    exact = ((v @ basis).square() * values.exp()).sum(1)
    torch.testing.assert_close(rule.form(torch.exp), exact, rtol=1e-12, atol=1e-12)
    # The longest of the three needs no more products than there are distinct eigenvalues.
    assert rule.num_products == 3 * 3


def test_no_ghosts_of_converged_eigenvalues() -> None:
    values = torch.cat([torch.tensor([1e6], dtype=F64), torch.linspace(0, 1, 79, dtype=F64)])
    W, _ = operator(values)
    v = torch.ones(1, 80, dtype=F64)
    nodes = quadrature(SymmetricMatrix(W), v, 40).nodes
    assert int((nodes > 10).sum()) == 1


def test_extreme_eigenvalues_of_a_large_float32_operator_are_right() -> None:
    values = torch.cat([torch.linspace(0, 0.01, 49_998), torch.tensor([-0.02, 1.0])])
    start = torch.ones(1, len(values))
    start[0, -2:] = 100
    nodes = quadrature(Diagonal(values), start, 20).nodes[0]
    assert float(nodes[-1]) == pytest.approx(1.0, rel=1e-5)
    assert float(nodes[0]) == pytest.approx(-0.02, rel=1e-4)


def test_unit_vectors_give_exact_traces() -> None:
    values = spread(16)
    W, _ = operator(values)
    density = spectral_density(SymmetricMatrix(W), 16, probes=16)
    for c in (1e-3, 1.0, 50.0):
        found = density.effective_dimension(c)
        assert found.value == pytest.approx(float((values / (values + c)).sum()), rel=1e-9)
        assert found.standard_error == 0
    nodes, counts = density.measure()
    assert float(counts.sum()) == pytest.approx(16)
    assert float((counts * nodes).sum()) == pytest.approx(float(values.sum()), rel=1e-10)


@pytest.mark.slow
def test_the_standard_error_of_traces_is_true_and_falls_with_the_root_of_the_probes() -> None:
    values = spread(60)
    W, _ = operator(values)
    exact = float((values / (values + 0.01)).sum())

    def estimates(probes: int) -> Tensor:
        found = [
            spectral_density(SymmetricMatrix(W), 25, probes=probes, seed=seed) for seed in range(60)
        ]
        rows = [density.effective_dimension(0.01) for density in found]
        return torch.tensor([(r.value - exact, r.standard_error) for r in rows], dtype=F64)

    few, many = estimates(4), estimates(36)
    for sample in (few, many):
        scatter = sample[:, 0].std()
        assert abs(sample[:, 0].mean()) < 4 * scatter / math.sqrt(60)
        assert 0.6 < float(sample[:, 1].square().mean().sqrt() / scatter) < 1.5
    # A ratio of two standard deviations of 60 samples lies within 1.4 of its mean, 3, surely.
    assert 3 / 1.4 < float(few[:, 0].std() / many[:, 0].std()) < 3 * 1.4


def test_probes_depend_on_the_seed_alone() -> None:
    W, _ = operator(spread(20))

    def nodes(seed: int, dtype: torch.dtype) -> Tensor:
        made = W.to(dtype)
        density = spectral_density(SymmetricMatrix(made), 3, probes=2, seed=seed)
        assert density.rules.nodes.dtype == dtype
        return density.rules.nodes.double()

    assert torch.equal(nodes(3, F64), nodes(3, F64))
    assert not torch.allclose(nodes(3, F64), nodes(4, F64))
    torch.testing.assert_close(nodes(3, torch.float32), nodes(3, F64), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f: quadrature(f, torch.ones(4, dtype=F64), 2), "expected \\(k, n\\)"),
        (lambda f: quadrature(f, torch.zeros(1, 4, dtype=F64), 2), "zero"),
        (lambda f: quadrature(f, torch.ones(1, 3, dtype=F64), 2), "expected \\(..., 4\\)"),
        (lambda f: spectral_density(f, 2, probes=0), "probes 0"),
        (lambda f: spectral_density(f, 2).effective_dimension(0.0), "positive"),
    ],
)
def test_what_cannot_be_is_refused(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call(SymmetricMatrix(torch.eye(4, dtype=F64)))
