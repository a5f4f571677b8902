"""Spectra with known answers."""

import math

import pytest
import torch

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.rank.low_rank import (
    numerical_rank,
    participation_ratio,
    principal_angles,
    singular_values,
    stable_rank,
    subspace_overlap,
    tail_energy,
    truncated,
)

F64 = torch.float64


def with_values(values: list[float], m: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    k = len(values)
    left, _ = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=F64))
    right, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=F64))
    return (left * torch.tensor(values, dtype=F64)) @ right.T


def test_a_matrix_of_known_spectrum() -> None:
    values = singular_values(with_values([4.0, 2.0, 1.0], 9, 6))
    torch.testing.assert_close(values[:3], torch.tensor([4.0, 2.0, 1.0], dtype=F64))
    assert stable_rank(values) == pytest.approx(21 / 16, rel=1e-12)
    assert participation_ratio(values) == pytest.approx(21**2 / 273, rel=1e-12)
    assert numerical_rank(values, (9, 6), torch.finfo(F64).eps) == 3
    assert participation_ratio(torch.ones(7)) == pytest.approx(7)
    assert stable_rank(1e-200 * torch.ones(5, dtype=F64)) != 0


def test_the_tail_is_the_squared_distance_to_the_truncation() -> None:
    matrix = with_values([5.0, 3.0, 2.0, 0.5], 7, 5)
    tails = tail_energy(singular_values(matrix))
    assert len(tails) == 6
    for rank in range(6):
        kept = truncated(matrix, rank)
        assert float((matrix - kept).square().sum()) == pytest.approx(float(tails[rank]), abs=1e-12)
        assert numerical_rank(singular_values(kept), (7, 5), 1e-15) == min(rank, 4)


def test_no_matrix_of_that_rank_is_nearer() -> None:
    matrix = with_values([5.0, 3.0, 2.0, 0.5], 7, 5)
    tails = tail_energy(singular_values(matrix))
    generator = torch.Generator().manual_seed(1)
    for rank in (1, 2, 3):
        basis = torch.randn(200, 7, rank, generator=generator, dtype=F64)
        frames, _ = torch.linalg.qr(basis)
        rest = matrix - frames @ (frames.mT @ matrix)  # the best with that range
        assert (rest.square().sum((1, 2)) >= tails[rank]).all()


def test_small_tails_keep_their_digits() -> None:
    tails = tail_energy(torch.tensor([1.0, 1e-9, 1e-12], dtype=F64))
    assert float(tails[2]) == pytest.approx(1e-24, rel=1e-12)
    assert float(tails[1]) == pytest.approx(1e-18, rel=1e-5)


@pytest.mark.parametrize("angle", [1e-12, 1e-5, 0.3, math.pi / 4, 1.2, math.pi / 2])
def test_angles_between_planes(angle: float) -> None:
    """span(e1, e2) and span(e1, cos e2 + sin e3): angles 0 and the given one."""
    first = torch.eye(4, dtype=F64)[:, :2]
    second = first.clone()
    second[1, 1], second[2, 1] = math.cos(angle), math.sin(angle)
    mixed = second @ torch.tensor([[2.0, 1.0], [0.5, -3.0]], dtype=F64)
    found = principal_angles(first, mixed)
    assert float(found[0]) == pytest.approx(0, abs=1e-15)
    assert float(found[1]) == pytest.approx(angle, rel=1e-3 if angle < 1e-10 else 1e-9)
    expected = (1 + math.cos(angle) ** 2) / 2
    assert subspace_overlap(first, mixed) == pytest.approx(expected, rel=1e-12)


def test_angles_of_subspaces_of_different_dimension() -> None:
    line, plane = torch.eye(5, dtype=F64)[:, :1], torch.eye(5, dtype=F64)[:, :2]
    assert principal_angles(line, plane).tolist() == pytest.approx([0.0], abs=1e-15)
    assert principal_angles(plane, line).tolist() == pytest.approx([0.0], abs=1e-15)
    assert subspace_overlap(plane, line) == pytest.approx(1.0)


def test_overlap_of_random_subspaces_has_the_stated_mean() -> None:
    generator = torch.Generator().manual_seed(2)
    fixed = torch.eye(40, dtype=F64)[:, :4]
    found = [
        subspace_overlap(torch.randn(40, 8, generator=generator, dtype=F64), fixed)
        for _ in range(400)
    ]
    mean, error = sum(found) / 400, torch.tensor(found).std() / 20
    assert abs(mean - 8 / 40) < 4 * float(error)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: singular_values(torch.ones(3)), "expected a matrix"),
        (lambda: singular_values(torch.full((2, 2), torch.nan)), "not finite"),
        (lambda: truncated(torch.eye(2), -1), "rank is -1"),
        (lambda: stable_rank(torch.zeros(3)), "zero matrix"),
        (lambda: tail_energy(torch.tensor([1.0, -1.0])), "none negative"),
        (lambda: principal_angles(torch.eye(3), torch.eye(2)), "R\\^3 and R\\^2"),
        (lambda: principal_angles(torch.ones(3, 2), torch.eye(3)), "span only 1"),
    ],
)
def test_bad_arguments(call, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()
