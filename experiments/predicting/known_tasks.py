"""Tasks of a study, by what is known of a task before training, and how methods did on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deltacontrol.experiments.heads import loss_and_accuracy
from deltacontrol.experiments.predicting.situation import Situation
from deltacontrol.theory.errors import InputError

FEATURES = ("log2 classes", "majority share", "log2 tokens", "head's loss over that of guessing")


@dataclass(frozen=True)
class KnownTask:
    """A task of a study.

    Attributes:
        name: of the task.
        corpus: whose texts these are.
        features: one number for each of `FEATURES`.
        losses: of each method at its end; the lower the better.
    """

    name: str
    corpus: str
    features: tuple[float, ...]
    losses: Mapping[str, float]


def features(situation: Situation) -> tuple[float, ...]:
    """`FEATURES` of a situation: of the rows, and of the frozen model with its fitted head."""
    import torch

    from deltacontrol.experiments.tasks.encoding import without_labels

    setting = situation.setting
    split, classes = setting.split("train"), len(setting.data.labels)
    with torch.no_grad():
        total = sum(
            len(batch["labels"])
            * loss_and_accuracy(situation.base(**without_labels(batch)).logits, batch["labels"])[0]
            for _, batch in situation.batches("validation")
        )
    loss = total / situation.num_heldout
    return (
        math.log2(classes),
        split.majority_share,
        math.log2(float(split.lengths.mean())),
        loss / math.log(classes),
    )


def nearest(own: Sequence[float], known: Sequence[KnownTask]) -> KnownTask:
    """The known task at the least distance, each feature in units of its spread over the study.

    Raises:
        InputError: no task is known.

    Example:
        >>> far = KnownTask("far", "a", (9.0, 0.0), {})
        >>> near = KnownTask("near", "b", (1.0, 0.1), {})
        >>> nearest((0.0, 0.0), [far, near]).name
        'near'
    """
    if not known:
        raise InputError("no task of a study is known; give some, each with its features")
    table = np.array([task.features for task in known], float)
    spread = table.std(0)
    distance = ((table - np.array(own)) / np.where(spread > 0, spread, 1.0)) ** 2
    return known[int(distance.sum(1).argmin())]
