"""Small convex tunings with every penalty and loss."""

from __future__ import annotations

import torch
from torch import Tensor

from deltacontrol.theory.control.problem import Box
from deltacontrol.theory.convex import ConvexTuning, GroupLasso, NormBall, NuclearNorm, Ridge
from deltacontrol.theory.convex.penalties import Penalty
from tests.theory.problems import normal

F64 = torch.float64
N, K, SIZES = 12, 3, (4, 2, 5)


def classes(num_examples: int, num_classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_classes, (num_examples,), generator=generator)


def data(loss: str, seed: int = 0) -> dict:
    labels = classes(N, K, seed) if loss == "cross-entropy" else normal(N, K, seed=seed + 1)
    return {"labels": labels, "offset": 0.5 * normal(N, K, seed=seed + 2), "loss": loss}


def tuning(penalty: str, loss: str) -> ConvexTuning:
    """A small problem for each penalty; groups of vectors, or two matrices."""
    vectors = normal(N, K, sum(SIZES), seed=7)
    matrices = {"one": normal(N, K, 3, 4, seed=8), "two": normal(N, K, 2, 3, seed=9)}
    options = data(loss)
    if penalty == "nuclear":
        return ConvexTuning(matrices, penalty=NuclearNorm(), **options)
    if penalty == "box":
        return ConvexTuning(vectors, groups=SIZES, box=Box(-0.1, 0.2), **options)
    made: dict[str, Penalty] = {"ridge": Ridge(), "ball": NormBall(), "lasso": GroupLasso()}
    return ConvexTuning(vectors, groups=SIZES, penalty=made[penalty], **options)


KINDS = [
    (penalty, loss)
    for penalty in ("ridge", "box", "ball", "lasso", "nuclear")
    for loss in ("cross-entropy", "squared-error")
]
WEIGHTS = {"ridge": 0.3, "box": 0.02, "ball": 0.4, "lasso": 0.06, "nuclear": 0.12}
