"""Random classes and features for convex tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.theory.problems import normal

N, K, SIZES = 12, 3, (4, 2, 5)


def classes(num_examples: int, num_classes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, num_classes, (num_examples,), generator=generator)


def data(loss: str, seed: int = 0) -> dict:
    labels = classes(N, K, seed) if loss == "cross-entropy" else normal(N, K, seed=seed + 1)
    return {"labels": labels, "offset": 0.5 * normal(N, K, seed=seed + 2), "loss": loss}
