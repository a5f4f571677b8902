"""Batches of the pre-training, each a function of the seed and the step.

An epoch is a permutation of the rows by (seed, epoch); members of one seed see the same rows in the
same order. A row of b = `BODY` tokens becomes

    decoder   [CLS] t_1 … t_b           predicts each t_i from what is before it
    encoder   [CLS] t_1 … t_b [SEP]     predicts round(0.4 b) of the t_i, drawn by (seed, step):
                                        0.8 of them are replaced by [MASK], 0.1 by any token, and
                                        0.1 stay (Devlin et al., NAACL 2019, appendix A.1; the
                                        share 0.4 as in Wettig et al., EACL 2023)

With so little text 0.4 tells a model more than the usual 0.15. Held-out rows are masked alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deltacontrol.experiments.models.family import BATCH_ROWS, FamilyName
from deltacontrol.experiments.tasks.encoding import IGNORED
from deltacontrol.experiments.training.pretraining.tokens import CLS, MASK, SEP, SPECIAL

MASKED, REPLACED, DRAWN = 0.4, 0.8, 0.1
HELD_OUT_SEED = 20230302


@dataclass(frozen=True, eq=False)
class RowBatches:
    """Rows of tokens as batches.

    Attributes:
        rows: token ids (rows, BODY).
        family: what is to be predicted.
        vocabulary: number of tokens.
        seed: of the order and the masks.
        size: rows of a batch.
    """

    rows: np.ndarray
    family: FamilyName
    vocabulary: int
    seed: int
    size: int = BATCH_ROWS

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of update `step` = 0, 1, 2 and so on."""
        count = max(1, len(self.rows) // self.size)
        epoch, place = divmod(step, count)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        chosen = order[place * self.size : (place + 1) * self.size]
        return self._of(self.rows[chosen], np.random.default_rng([self.seed, step, 1]))

    def held_out(self, most: int) -> Iterator[dict[str, Any]]:
        """At most so many of the first rows, in order; masks do not depend on `seed`."""
        chooses = np.random.default_rng(HELD_OUT_SEED)
        rows = self.rows[:most]
        for start in range(0, len(rows), self.size):
            yield self._of(rows[start : start + self.size], chooses)

    def _of(self, rows: np.ndarray, chooses: np.random.Generator) -> dict[str, Any]:
        body = rows.astype(np.int64)
        if self.family == "decoder":
            ids = torch.from_numpy(np.pad(body, ((0, 0), (1, 0)), constant_values=CLS))
            return {"input_ids": ids, "labels": ids.clone()}
        hidden, labels = masked(body, self.vocabulary, chooses)
        ends = ((0, 0), (1, 1))
        inputs = np.pad(hidden, ends, constant_values=((0, 0), (CLS, SEP)))
        targets = np.pad(labels, ends, constant_values=IGNORED)
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(targets)}


def masked(
    body: np.ndarray, vocabulary: int, chooses: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Hide tokens of rows (rows, tokens); return what is shown, and what is to be predicted.

    In each row round(0.4·tokens) are to be predicted, one at least; elsewhere the label is
    `IGNORED`.
    """
    count = max(1, round(MASKED * body.shape[1]))
    places = np.argsort(chooses.random(body.shape), axis=1)[:, :count]
    own = np.take_along_axis(body, places, axis=1)
    how = chooses.random(own.shape)
    other = chooses.integers(len(SPECIAL), vocabulary, own.shape)
    shown = np.where(how < REPLACED, MASK, np.where(how < REPLACED + DRAWN, other, own))
    hidden, labels = body.copy(), np.full_like(body, IGNORED)
    np.put_along_axis(hidden, places, shown, axis=1)
    np.put_along_axis(labels, places, own, axis=1)
    return hidden, labels
