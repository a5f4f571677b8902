"""Thresholds of LoRA's rank: constructions against the least error that any factors can reach."""

import math

import pytest
import torch
from torch import Tensor

from deltacontrol.theory.errors import InputError
from deltacontrol.theory.rank.expressive_rank import (
    ReLUNetwork,
    adapted_network,
    adapted_product,
    product,
    rank_threshold,
)

F64 = torch.float64
N = 10


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64) / shape[-1] ** 0.5


def frozen(depth: int, seed: int = 0) -> list[Tensor]:
    return [normal(N, N, seed=100 * seed + layer) for layer in range(depth)]


def off_by(maps: list[Tensor], rank: int, seed: int = 5) -> Tensor:
    return product(maps) + 3 * normal(N, rank, seed=seed) @ normal(rank, N, seed=seed + 1)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("missing", [0, 1, 6, N])
def test_the_product_reaches_the_target_at_the_threshold_and_not_below(
    depth: int, missing: int
) -> None:
    maps = frozen(depth)
    target = off_by(maps, missing)
    threshold = rank_threshold(target, maps)
    assert threshold == math.ceil(missing / depth)
    for rank in range(threshold + 2):
        found = adapted_product(target, maps, rank)
        assert found.condition < 1e5
        assert found.distance == pytest.approx(found.least, abs=1e-10)
        assert (found.distance < 1e-10) == (rank >= threshold)
        for change, before, after in zip(found.changes, maps, found.maps, strict=True):
            values = torch.linalg.svdvals(change)
            assert not rank or (values[rank:] <= 1e-9 * max(1, float(values[0]))).all()
            torch.testing.assert_close(before + change, after)


def test_no_changes_of_that_rank_come_nearer() -> None:
    """Random ones, and those of the construction moved a little."""
    maps, rank = frozen(2), 2
    target = off_by(maps, 7)
    found = adapted_product(target, maps, rank)
    for seed in range(200):
        moved = []
        for layer, (before, change) in enumerate(zip(maps, found.changes, strict=True)):
            left, values, right = torch.linalg.svd(change)
            B = left[:, :rank] * values[:rank] + 0.1 * normal(N, rank, seed=7 * seed + layer)
            A = right[:rank] + 0.1 * normal(rank, N, seed=7 * seed + layer + 3)
            moved.append(before + B @ A)
        distance = float(torch.linalg.matrix_norm(product(moved) - target, 2))
        assert distance >= found.least * (1 - 1e-12)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_relu_network_computes_the_target_at_the_threshold(depth: int) -> None:
    maps = frozen(2 * depth, seed=1)
    groups = maps[:depth], maps[depth:]
    target = ReLUNetwork(
        [off_by(group, 6, seed=20 + i) for i, group in enumerate(groups)],
        [normal(N, seed=30), normal(N, seed=31)],
    )
    threshold = max(rank_threshold(w, g) for w, g in zip(target.weights, groups, strict=True))
    assert threshold == math.ceil(6 / depth)
    z = normal(300, N, seed=40)
    z = 2.0 * z / z.norm(dim=1, keepdim=True)
    wanted = target(z)
    assert 0.1 < (wanted > 0).double().mean() < 0.9  # the target's own ReLUs do act
    exact, _ = adapted_network(target, maps, threshold, radius=2.0)
    assert (exact(z) - wanted).norm() <= 1e-9 * wanted.norm()
    below, _ = adapted_network(target, maps, threshold - 1, radius=2.0)
    assert (below(z) - wanted).norm() > 1e-2 * wanted.norm()
    # Beyond the ball the hidden ReLUs cut in.
    if depth > 1:
        far = 1e4 * z
        assert (exact(far) - target(far)).norm() > 1e-3 * target(far).norm()


def test_singular_maps_and_partial_sums_are_refused() -> None:
    maps = frozen(2)
    flat = maps[0].clone()
    flat[:, 0] = 0
    with pytest.raises(InputError, match="singular"):
        adapted_product(off_by(maps, 4), [maps[0], flat], 2)
    # Whichever half of E = -(e_1 e_1' + e_2 e_2') comes first, it makes the identity singular.
    ones = [torch.eye(4, dtype=F64)] * 2
    with pytest.raises(InputError, match="partial sum"):
        adapted_product(torch.diag(torch.tensor([0.0, 0, 1, 1], dtype=F64)), ones, 1)
    nearly = torch.diag(torch.tensor([1e-7, 1e-7, 1, 1], dtype=F64))
    assert adapted_product(nearly, ones, 1).condition == pytest.approx(1e7)
    # All of it in the last layer meets no partial sum, whatever the target.
    assert adapted_product(nearly, ones[:1], 2).condition == 1


def test_of_several_splits_the_best_conditioned_is_taken() -> None:
    """With the leading part of E, -e_1 e_1', first, the identity would become nearly singular."""
    ones = [torch.eye(4, dtype=F64)] * 2
    target = torch.diag(torch.tensor([1e-7, 1.5, 1, 1], dtype=F64))
    found = adapted_product(target, ones, 1)
    assert found.condition == pytest.approx(1.5) and found.distance <= 1e-12


def test_wrong_shapes_and_numbers_are_named() -> None:
    maps = frozen(3)
    for call, words in (
        (lambda: rank_threshold(normal(N, 4), maps), "shapes"),
        (lambda: adapted_product(normal(N, N), [], 1), "one or more frozen maps"),
        (lambda: adapted_product(normal(N, N), maps, -1), "rank is -1"),
        (lambda: adapted_product(normal(N, N) / 0, maps, 1), "not finite"),
        (lambda: adapted_network(ReLUNetwork(maps[:2], [normal(N)] * 2), maps, 1, 1.0), "equal"),
        (lambda: adapted_network(ReLUNetwork(maps[:1], [normal(N)]), maps, 1, 0.0), "radius"),
    ):
        with pytest.raises(InputError, match=words):
            call()
