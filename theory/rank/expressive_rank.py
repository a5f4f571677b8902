"""From which rank on LoRA can turn a deep network into a given one, and the factors that do it.

A frozen product of square maps W_M ... W_1 becomes (W_M + Δ_M) ... (W_1 + Δ_1), rank Δ_l <= R. With
E = target - W_M ... W_1 and s_i its singular values, the least spectral distance to the target is

    s_{MR + 1}(E),         zero if and only if       R >= rank(E)/M,

provided that W_M ... W_1 and the partial sums on the way to the target are invertible. The same
factors carry over to ReLU networks whose biases are free: in a group of M layers all ReLUs but the
last are kept active by large biases, so that the group computes ReLU(target z + bias).

Maps are (n, n) and act on columns; layers are listed in the order in which they act, W_1 first.

Source: Zeng & Lee, *The Expressive Power of Low-Rank Adaptation*, ICLR 2024. The construction here
adds the singular parts of E one layer after another, as derived in proofs_notebooks/11_*.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deltacontrol.theory.arguments import typed
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.rank.low_rank import numerical_rank

SPLITS = 24  # ways of sharing the singular parts out among the layers that are tried

__all__ = [
    "AdaptedProduct",
    "ReLUNetwork",
    "adapted_network",
    "adapted_product",
    "product",
    "rank_threshold",
]


@typed
def product(maps: Sequence[Tensor]) -> Tensor:
    """W_M ... W_1."""
    result = maps[0]
    for matrix in maps[1:]:
        result = matrix @ result
    return result


@typed
def rank_threshold(target: Tensor, frozen: Sequence[Tensor]) -> int:
    """⌈rank(target - W_M ... W_1) / M⌉: the least rank of every layer's change that may suffice.

    The rank is counted up to the rounding of the product, relative to ‖W_M ... W_1‖ + ‖target‖.

    Raises:
        InputError: the maps are not square, of one size, and finite.
    """
    difference, size = _difference(target, frozen)
    values = torch.linalg.svdvals(difference)
    eps = 10 * torch.finfo(torch.float64).eps * size / max(float(values.max()), 1e-300)
    return math.ceil(numerical_rank(values, tuple(difference.shape), eps) / len(frozen))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class AdaptedProduct:
    """Changes of the layers of a product.

    Attributes:
        changes: Δ_l, each of rank at most R, in the order of the layers.
        maps: W_l + Δ_l.
        distance: spectral distance of their product to the target, measured.
        least: s_{MR+1}(E), the least that any changes of this rank reach.
        condition: the largest condition number of W_M ... W_1 and of the partial sums; infinite
            where one is singular, and then ``changes`` need not be optimal.
    """

    changes: list[Tensor]
    maps: list[Tensor]
    distance: float
    least: float
    condition: float


@typed
def adapted_product(target: Tensor, frozen: Sequence[Tensor], rank: int) -> AdaptedProduct:
    """The changes of rank R that bring a product nearest to the target.

    Layer l adds R of the MR leading singular parts of E to the product. Which layer adds which is
    free: of several splits the one with the best conditioned partial sums is taken.

    Args:
        target: (n, n).
        frozen: W_1, ..., W_M, each (n, n).
        rank: R.

    Raises:
        InputError: the maps are not square, of one size, and finite; a map is exactly singular; or
            a negative rank.
    """
    if rank < 0:
        raise InputError(f"rank is {rank}; expected a whole number >= 0")
    difference, _ = _difference(target, frozen)
    maps = [matrix.double() for matrix in frozen]
    left, values, right = torch.linalg.svd(difference)
    depth, kept = len(maps), min(len(values), len(maps) * rank)
    reached = product(maps)

    def parts(order: Tensor) -> list[Tensor]:
        runs = order.split(rank) if kept else ()
        found = [(left[:, run] * values[run]) @ right[run] for run in runs]
        return found + [torch.zeros_like(reached)] * (depth - len(found))

    def condition(order: Tensor) -> float:
        sums = torch.stack([reached, *parts(order)]).cumsum(0)[:-1]  # what layers divide by
        return max(_condition(matrix) for matrix in sums)

    generator = torch.Generator().manual_seed(0)
    orders = [torch.arange(kept), torch.arange(kept).flip(0)]
    orders += [torch.randperm(kept, generator=generator) for _ in range(SPLITS - len(orders))]
    best = min(orders, key=condition)
    changes, adapted = _changes(maps, parts(best))
    distance = float(torch.linalg.matrix_norm(product(adapted) - target.double(), 2))
    least = float(values[kept]) if kept < len(values) else 0.0
    return AdaptedProduct(changes, adapted, distance, least, condition(best))


def _changes(maps: Sequence[Tensor], parts: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Δ_l = (W_M ... W_{l+1})⁻¹ E_l (V_{l-1} ... V_1)⁻¹ and V_l = W_l + Δ_l."""
    before = identity = torch.eye(len(maps[0]), dtype=torch.float64)
    changes, adapted = [], []
    for layer, part in enumerate(parts):
        after = product([identity, *maps[layer + 1 :]])
        try:
            change = torch.linalg.solve(before, torch.linalg.solve(after, part), left=False)
        except RuntimeError as error:
            raise InputError(
                "a map, or a partial sum on the way to the target, is singular; the construction "
                "needs invertible ones: try other frozen maps"
            ) from error
        changes.append(change)
        adapted.append(maps[layer] + change)
        before = adapted[-1] @ before
    return changes, adapted


@dataclass(frozen=True, eq=False)
class ReLUNetwork:
    """h_l = ReLU(W_l h_{l-1} + b_l), all layers of one width.

    Attributes:
        weights: W_l (n, n), first layer first.
        biases: b_l (n,).
    """

    weights: list[Tensor]
    biases: list[Tensor]

    def __call__(self, z: Tensor) -> Tensor:
        """The last h of the rows z (examples, n)."""
        for weight, bias in zip(self.weights, self.biases, strict=True):
            z = torch.relu(z @ weight.mT + bias)
        return z


@typed
def adapted_network(
    target: ReLUNetwork, frozen: Sequence[Tensor], rank: int, radius: float
) -> tuple[ReLUNetwork, list[AdaptedProduct]]:
    """A deeper network with changes of rank R and free biases that computes the target's function.

    The L frozen layers form equal groups, one for each of the target's layers. Equal on inputs of
    norm up to ``radius``, if R reaches `rank_threshold` in every group; else each group computes
    the nearest map of `adapted_product`.

    Args:
        target: of L̄ layers.
        frozen: L weights, a multiple of L̄.
        rank: R.
        radius: of the ball of inputs.

    Raises:
        InputError: L is no multiple of L̄, no positive radius, or as `adapted_product`.
    """
    if not frozen or len(frozen) % len(target.weights):
        raise InputError(
            f"{len(frozen)} frozen layers cannot form equal groups for the {len(target.weights)} "
            "layers of the target; expected a multiple"
        )
    if not 0 < radius < math.inf:
        raise InputError(f"radius is {radius}; expected a positive number")
    depth = len(frozen) // len(target.weights)
    weights, biases, groups = [], [], []
    for index, bias in enumerate(target.biases):
        group = frozen[index * depth : (index + 1) * depth]
        found = adapted_product(target.weights[index], group, rank)
        groups.append(found)
        weights += found.maps
        biases += _linearising(found.maps, bias.double(), radius)
        whole = product(found.maps)
        radius = float(torch.linalg.matrix_norm(whole, 2)) * radius + float(bias.norm())
    return ReLUNetwork(weights, biases), groups


def _linearising(maps: Sequence[Tensor], bias: Tensor, radius: float) -> list[Tensor]:
    """Biases with h_l = V_l ... V_1 z + β_l 1 >= 0 before the last layer, which removes β again."""
    ones = torch.ones_like(bias)
    biases, shift, whole = [], 0.0, torch.eye(len(bias), dtype=torch.float64)
    for weight in maps[:-1]:
        whole = weight @ whole
        needed = float(whole.norm(dim=1).max()) * radius
        biases.append(needed * ones - weight @ (shift * ones))
        shift = needed
    return [*biases, bias - maps[-1] @ (shift * ones)]


def _difference(target: Tensor, frozen: Sequence[Tensor]) -> tuple[Tensor, float]:
    shapes = {tuple(matrix.shape) for matrix in (target, *frozen)}
    if not frozen or len(shapes) != 1 or target.ndim != 2 or target.shape[0] != target.shape[1]:
        raise InputError(
            "expected a target and one or more frozen maps, all (n, n); got shapes "
            f"{sorted(shapes)}"
        )
    if not all(matrix.isfinite().all() for matrix in (target, *frozen)):
        raise InputError("a map has entries that are not finite")
    reached = product([matrix.double() for matrix in frozen])
    norms = (torch.linalg.matrix_norm(matrix, 2) for matrix in (reached, target.double()))
    return target.double() - reached, float(sum(norms))


def _condition(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix)
    return float(values.max() / values.min()) if values.min() > 0 else math.inf
