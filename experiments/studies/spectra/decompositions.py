"""Weight changes taken apart: singular values, tails, and overlaps with LoRA's factors.

`deltacontrol.experiments.studies.spectra.updates` says what is compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    Changes = dict[str, Tensor]  # by site: D (out, in)
    Factors = dict[str, tuple[Tensor, Tensor]]  # by site: B (out, r) and Aᵀ (in, r)
    Decompositions = dict[str, tuple[Tensor, Tensor, Tensor]]  # by site: U, s, V of D = U s Vᵀ


def decomposed(changes: Changes) -> Decompositions:
    """U, s and V of every change."""
    import torch

    found = {}
    for key, change in changes.items():
        left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
        found[key] = (left, values, right.mT)
    return found


def tail_share(decompositions: Decompositions, rank: int) -> float:
    """Σ tail(r) / Σ tail(0) over the modules."""
    from deltacontrol.theory.rank.low_rank import tail_energy

    tails = [tail_energy(values) for _, values, _ in decompositions.values()]
    beyond = sum(float(t[min(rank, len(t) - 1)]) for t in tails)
    return beyond / sum(float(t[0]) for t in tails)


def overlaps_with(factors: Factors, last: Decompositions) -> dict[str, float]:
    """Means over the modules, and what random subspaces would have."""
    from deltacontrol.theory.rank.low_rank import subspace_overlap

    rows = []
    for key, (B, A) in factors.items():
        left, _, right = last[key]
        rank = B.shape[1]
        rows.append(
            {
                "left": subspace_overlap(B, left[:, :rank]),
                "right": subspace_overlap(A, right[:, :rank]),
                "left_by_chance": rank / len(B),
                "right_by_chance": rank / len(A),
            }
        )
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
