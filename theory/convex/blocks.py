"""From the features of groups to the blocks that a penalty's norms act on.

This is where the exact reductions of `deltacontrol.theory.convex.features` are applied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltacontrol.theory.convex.features import (
    DenseFeatures,
    Features,
    as_array,
    orthonormal,
    rotation,
)
from deltacontrol.theory.convex.penalties import BoxedRidge, Penalty
from deltacontrol.theory.errors import InputError

__all__ = ["Block", "as_matrix", "blocks", "named_groups"]


@dataclass(frozen=True, eq=False)
class Block:
    """What one norm of the penalty acts on, in reduced coordinates.

    `groups` says which groups it holds, `expand` gives their controls from the block's.
    """

    features: Features
    groups: tuple[int, ...]
    expand: Callable[[np.ndarray], list[np.ndarray]]
    operator_norm: float


def blocks(features: Sequence[Features], penalty: Penalty, memory_limit: int) -> list[Block]:
    """One block of all groups for a joint penalty, else one for each.

    Args:
        features: of the groups.
        penalty: decides which reduction is exact.
        memory_limit: the largest size of dense features in bytes.
    """
    rank = features[0].num_examples * features[0].num_logits
    if penalty.joint:
        rotates = not isinstance(penalty, BoxedRidge)
        everything = tuple(range(len(features)))
        return [_joined(features, everything, rank if rotates else None, memory_limit)]
    if penalty.spectral:
        return [_projected(f, (g,)) for g, f in enumerate(features)]
    return [_joined([f], (g,), rank, memory_limit) for g, f in enumerate(features)]


def _joined(
    features: Sequence[Features], groups: tuple[int, ...], rank: int | None, memory_limit: int
) -> Block:
    """One vector block of several groups, rotated where that makes it smaller."""
    sizes = [f.shape[1] for f in features]
    cuts = np.cumsum(sizes)[:-1]
    dense = all(isinstance(f, DenseFeatures) for f in features)
    if rank is not None and not dense and sum(sizes) > rank:
        # G G' = V S^2 V' gives B = V S, and u = Q b = G'V S^{-1} b.
        values, vectors = np.linalg.eigh(sum(f.kernel() for f in features))
        kept = values > len(values) * np.finfo(float).eps * max(values.max(initial=0.0), 0.0)
        lengths = np.sqrt(values[kept])
        matrix, coefficients = vectors[:, kept] * lengths, vectors[:, kept] / lengths

        def from_kernel(b: np.ndarray) -> list[np.ndarray]:
            a = torch.from_numpy(coefficients @ b)
            return [(f.T @ a).numpy() for f in features]

        return _block(matrix, features[0], groups, from_kernel)
    for f in features:
        check_memory("a group", f, memory_limit, dense=True)
    matrix = np.concatenate([as_matrix(f) for f in features], axis=1)
    if rank is None or sum(sizes) <= rank:
        return _block(matrix, features[0], groups, lambda b: np.split(b, cuts))
    reduced, basis = rotation(matrix)
    return _block(reduced, features[0], groups, lambda b: np.split(basis @ b, cuts))


def _block(
    matrix: np.ndarray,
    like: Features,
    groups: tuple[int, ...],
    expand: Callable[[np.ndarray], list[np.ndarray]],
) -> Block:
    array = matrix.reshape(like.num_examples, like.num_logits, matrix.shape[1])
    norm = float(np.linalg.norm(matrix, 2)) if matrix.size else 0.0
    return Block(DenseFeatures(array), groups, expand, norm)


def as_matrix(features: Features) -> np.ndarray:
    """``(N K, m)``, formed if the features are factored."""
    if isinstance(features, DenseFeatures):
        return features.matrix
    p, q = features.control_shape
    return features.restrict(np.eye(p), np.eye(q)).matrix


def _projected(features: Features, groups: tuple[int, ...]) -> Block:
    """One matrix block, projected on the column and row spaces where they are smaller."""
    left, right = (orthonormal(side) for side in features.sides())
    norm = features.frobenius()
    if (left.shape[1], right.shape[1]) == features.control_shape:
        return Block(features, groups, lambda w: [w], norm)
    return Block(
        features.restrict(left, right), groups, lambda a: [left @ a @ right.T], norm
    )  # fmt: skip


def named_groups(
    features: Tensor | Sequence[Tensor | Features] | Mapping[str, Tensor | Features],
    groups: Sequence[int] | None,
) -> tuple[tuple[str, ...], list[Features]]:
    """Names and features of the groups, in all the forms that `ConvexTuning` accepts.

    Raises:
        InputError: for sizes that do not add up, no groups, no examples, numbers not finite.
    """
    if isinstance(features, Tensor | np.ndarray):
        whole = DenseFeatures(as_array(features))
        sizes = [whole.control_shape[-1]] if groups is None else list(groups)
        if groups is not None and (len(whole.control_shape) != 1 or sum(sizes) != whole.shape[1]):
            raise InputError(
                f"the groups have {sum(sizes)} controls in all, and the features, of shape "
                f"{tuple(features.shape)}, {whole.control_shape[-1]}; they must be equal"
            )
        parts = np.split(whole.array, np.cumsum(sizes)[:-1], axis=-1)
        return tuple(map(str, range(len(parts)))), _checked([DenseFeatures(p) for p in parts])
    if groups is not None:
        raise InputError("groups split a single tensor of features; here each group has its own")
    if not isinstance(features, Mapping):
        features = {str(g): f for g, f in enumerate(features)}
    found = [
        f if isinstance(f, Features) else DenseFeatures(as_array(f)) for f in features.values()
    ]
    if not found:
        raise InputError("there are no features; expected at least one group of controls")
    return tuple(features), _checked(found)


def _checked(features: list[Features]) -> list[Features]:
    if not any(f.shape[1] for f in features):
        raise InputError("the features have no controls; expected at least one column")
    for f in features:
        if f.num_examples < 1 or not math.isfinite(f.frobenius()):
            raise InputError(
                f"features of {f.num_examples} examples with norm {f.frobenius()}: expected at "
                "least one example and finite numbers"
            )
    return features


def check_memory(name: str, features: Features, limit: int, dense: bool = False) -> None:
    numbers = features.numbers()
    if dense:
        numbers = features.shape[0] * features.shape[1]
    if 8 * numbers > limit:
        raise InputError(
            f"the features of {name} take {8 * numbers / 2**30:.1f} GiB and memory_limit is "
            f"{limit / 2**30:.1f} GiB; take fewer examples, hand the weight of a linear map over "
            "as OuterProducts (its factors), or rotate each group to the rank of its features "
            "first (deltacontrol.theory.convex.rotation), which is exact for Ridge, NormBall and "
            "GroupLasso"
        )
