"""Two classes as one number: the margin z = logit(second class) - logit(first class) of an example.

The loss of two classes depends on the margin alone, so a model with a classification head has one
output per example; a causal language model has one as well, through two words that follow a prompt
(a verbaliser). With the sign s = ±1 of the label, loss = log(1 + exp(-s z)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import softplus

from deltacontrol.experiments.tasks.encoding import Batch, EncodedSplit, without_labels
from deltacontrol.theory.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltacontrol.experiments.setting import Setting


@dataclass(frozen=True, eq=False)
class MarginData:
    """A model, and examples of two classes.

    Attributes:
        model: the frozen model, its head fitted where it has one.
        examples: those that are tuned on; their labels are ``signs``.
        signs: +1 for the second class and -1 for the first, (n,).
        test: unseen examples; their labels are ``test_signs``.
        test_signs: likewise.
        words: the numbers of the two words, for a causal language model.
    """

    model: PreTrainedModel
    examples: EncodedSplit
    signs: Tensor
    test: EncodedSplit
    test_signs: Tensor
    words: tuple[int, int] | None = None

    @classmethod
    def of(cls, setting: Setting) -> MarginData:
        """The training rows of a setting as examples, its test rows as unseen ones.

        Raises:
            InputError: the task has not two classes, or what the setting raises.
        """
        task = setting.data
        if task.kind != "classification" or len(task.labels) != 2:
            raise InputError(
                f"{task.name} is no classification of two classes; try movie, rt or sms."
            )
        examples, test = setting.split("train"), setting.split("test")
        return cls(setting.base, examples, _signs(examples), test, _signs(test), setting.words)

    def batch(self, split: EncodedSplit, rows: Sequence[int] | None = None) -> Batch:
        """The model's arguments for rows of ``examples`` or ``test``, all by default."""
        return without_labels(split.batch(rows))

    def singles(self, split: EncodedSplit) -> list[Batch]:
        """Every row by itself, without padding."""
        return [without_labels(batch) for batch in split.batches(1)]

    def functional(self, logits: Tensor, mask: Tensor) -> Tensor:
        """K of the shape of ``logits`` with z_i = Σ K[i]·logits[i]."""
        K = torch.zeros_like(logits)
        if self.words is None:
            K[:, 0], K[:, 1] = -1, 1
            return K
        rows, last = torch.arange(len(K)), mask.sum(1) - 1
        K[rows, last, self.words[0]], K[rows, last, self.words[1]] = -1, 1
        return K

    def margins(self, logits: Tensor, mask: Tensor) -> Tensor:
        """z, (n,)."""
        return (self.functional(logits.detach(), mask) * logits).flatten(1).sum(1)


def logistic_loss(margins: Tensor, signs: Tensor) -> Tensor:
    """Mean of log(1 + exp(-s z)): the cross-entropy of two classes."""
    return softplus(-signs.to(margins) * margins).mean()


def logistic_derivatives(margins: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient (n,) and Hessian (n, n) of the mean loss in the margins."""
    signs = signs.to(margins)
    gradient = -signs * torch.sigmoid(-signs * margins) / len(margins)
    curvature = torch.sigmoid(margins) * torch.sigmoid(-margins) / len(margins)
    return gradient, torch.diag(curvature)


def _signs(split: EncodedSplit) -> Tensor:
    return 2 * torch.tensor(split.labels, dtype=torch.float64) - 1
