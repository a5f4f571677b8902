"""A model before any training, and the quadratic problem that fine-tuning starts as.

With the logits' contrasts ``f`` of ``N`` rows, Jacobian ``J`` over the controls and the factor
``C C'`` of the cross-entropy's Hessian, ``C s`` its gradient, the Gauss-Newton model at the initial
point is ``L_0 + s'Z delta + 1/2 ||Z delta||^2`` with ``Z = C'J``; see
`deltacontrol.theory.linear.model_curvature`. All of it that matters is in the tangent kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from deltacontrol.experiments.heads import head_controls
from deltacontrol.experiments.measures.tangent_kernel import TangentKernel, tangent_kernel
from deltacontrol.experiments.tasks.encoding import Batch, without_labels
from deltacontrol.theory.dimension.subspace_outputs import LinearisedRows, eliminate
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.model_curvature import softmax_factor

if TYPE_CHECKING:
    from deltacontrol.experiments.setting import Setting

LEAST_ROWS = 10
DRAWS = 400  # of subspaces, for accuracies


class InitialModel:
    """A model at its initial point, and the tangent kernel of training and of held-out rows.

    Args:
        setting: model and rows, of a classification. Its deltas are those whose parameters are
            restricted to a subspace; all of the model if there are none. The head is trained beside
            it, without restriction, where none of them moves it. The held-out rows are the
            validation rows; with none of them there are no accuracies. In float64 the kernels are
            exact.

    Attributes:
        controlled: the model with the deltas.
        contrasts: orthonormal contrasts of the logits, ``(classes, classes - 1)``.
        labels: of the training rows, ``(rows,)``.
        heldout_labels: likewise.
        restricted: names of the controls that a subspace is of.
        free: names of those trained beside it.

    Raises:
        InputError: the task is no classification, there are other than `LEAST_ROWS` to all rows, or
            a delta is a subspace itself.
    """

    def __init__(self, setting: Setting) -> None:
        from deltacontrol.deltas import FullFineTuning, HeadTuning, attach
        from deltacontrol.deltas.methods.parts.coordinates import SubspaceDelta

        task = setting.data
        if task.kind != "classification":
            raise InputError(f"{task.name} is a {task.kind} task; a prediction needs classes")
        if len(task.labels) < 2:
            raise InputError(f"{task.name} has one class, {task.labels}; a prediction needs two")
        for name, wanted, rows in (
            ("rows", setting.train_rows, task.train),
            ("heldout", setting.validation_rows, task.validation),
        ):
            least = LEAST_ROWS if name == "rows" else 0
            if not least <= (len(rows) if wanted is None else wanted) <= len(rows):
                raise InputError(
                    f"{name} is {wanted}; {task.name} allows {least} to {len(rows)} of them"
                )
        made = setting.parsed_deltas or [FullFineTuning()]
        if any(isinstance(delta, SubspaceDelta) for delta in made):
            raise InputError(
                "a delta is a subspace itself; give the one whose parameters it is of, or none "
                "for all parameters of the model"
            )
        self.base = setting.base
        self._train, self._validation = setting.split("train"), setting.split("validation")
        self.controlled = attach(self.base, *made, seed=setting.seed)
        self.restricted = list(self.controlled.trainable())
        if not head_controls(self.controlled):
            self.controlled.detach()
            self.controlled = attach(self.base, *made, HeadTuning(), seed=setting.seed)
        self.free = [n for n in self.controlled.trainable() if n not in self.restricted]
        self.contrasts = _contrasts(len(task.labels))
        self.rows, self.heldout = len(self._train), len(self._validation)
        self.labels, self.heldout_labels = (
            torch.from_numpy(split.labels) for split in (self._train, self._validation)
        )

    @cached_property
    def kernel(self) -> TangentKernel:
        """Over all controls, of the contrasts of the logits, training rows first."""
        examples = [*self._train.batches(1), *self._validation.batches(1)]
        contrasts = self.contrasts
        return tangent_kernel(
            self.controlled,
            self.controlled.trainable(),
            examples,
            lambda out, _: out.logits[0] @ contrasts.to(out.logits),
        )

    @property
    def num_parameters(self) -> int:
        """``D``, of what the subspace is of."""
        trainable = self.controlled.trainable()
        return sum(trainable[name].numel() for name in self.restricted)

    @property
    def scale(self) -> float:
        """The largest squared norm of a contrast's gradient, to tell zero from rounding."""
        return float((self._totals[0] + self._totals[1]).diagonal().max())

    def batches(self, size: int = 32) -> list[Batch]:
        """The training rows in order, with labels."""
        return list(self._train.batches(size))

    def loss(self, rows: Tensor) -> float:
        """At the start, over training rows."""
        return float(torch.nn.functional.cross_entropy(self.logits(rows), self.labels[rows]))

    def linearised(
        self, rows: Tensor | None = None, heldout: Tensor | None = None
    ) -> LinearisedRows:
        """The Gauss-Newton problem of some of the rows, all by default.

        Parameters outside of the subspace, a head beside it, are eliminated.

        Args:
            rows: numbers of training rows.
            heldout: numbers of held-out rows.
        """
        rows = torch.arange(self.rows) if rows is None else rows
        heldout = torch.arange(self.heldout) if heldout is None else heldout
        factor, s = softmax_factor(self.logits(rows), self.labels[rows])
        found = self._products(self.restricted, rows, heldout, factor, s)
        if self.free:
            found = eliminate(found, self._products(self.free, rows, heldout, factor, s))
        return found

    def accuracies(self, problem: LinearisedRows, kappa: float, heldout: Tensor) -> Tensor:
        """Accuracies on held-out rows of random subspaces, `DRAWS` of them."""
        mean, covariance = problem.trained(kappa)
        values, vectors = torch.linalg.eigh(covariance)
        noise = torch.randn(
            len(mean), DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        drawn = mean[:, None] + vectors @ (values.clamp_min(0).sqrt()[:, None] * noise)
        logits = torch.einsum("kc,ncs->nks", self.contrasts, drawn.view(len(heldout), -1, DRAWS))
        right = logits.argmax(1) == self.heldout_labels[heldout][:, None]
        return right.double().mean(0)

    def logits(self, rows: Tensor) -> Tensor:
        """Of training rows at the start, up to their mean, ``(len(rows), classes)``."""
        return self.kernel.outputs[rows].double() @ self.contrasts.mT

    @cached_property
    def _totals(self) -> tuple[Tensor, Tensor]:
        return self.kernel.total(self.restricted), self.kernel.total(self.free)

    def _products(
        self, names: Sequence[str], rows: Tensor, heldout: Tensor, factor: Tensor, s: Tensor
    ) -> LinearisedRows:
        """``Z = C'J`` of rows and ``T = J`` of held-out rows, over the named controls."""
        width = self.contrasts.shape[1]
        places = torch.cat([rows, self.rows + heldout])
        entries = (places[:, None] * width + torch.arange(width)).flatten()
        inner = self._totals[names is self.free][entries][:, entries]
        n = len(rows) * width
        left = torch.block_diag(*torch.einsum("nka,kc->nac", factor, self.contrasts))
        outputs = self.kernel.outputs[self.rows + heldout].flatten()
        cross = inner[n:, :n] @ left.mT
        kernel = left @ inner[:n, :n] @ left.mT
        return LinearisedRows(kernel, s.flatten(), outputs, cross, inner[n:, n:])

    def pulled(self, weights: Tensor) -> dict[str, Tensor]:
        """``sum_n J_n' w_n`` by name, for weights ``(rows, classes)`` of the logits."""
        trainable = self.controlled.trainable()
        total = {name: torch.zeros_like(p) for name, p in trainable.items()}
        done = 0
        for batch in self.batches():
            logits = self.controlled(**without_labels(batch)).logits
            value = (logits * weights[done : done + len(logits)].to(logits)).sum()
            done += len(logits)
            found = torch.autograd.grad(
                value, list(trainable.values()), allow_unused=True, materialize_grads=True
            )
            for name, gradient in zip(trainable, found, strict=True):
                total[name] += gradient
        return total


def _contrasts(classes: int) -> Tensor:
    """Orthonormal columns without a common offset of the logits, ``(classes, classes - 1)``."""
    offset = torch.ones(classes, 1, dtype=torch.float64)
    return torch.linalg.qr(torch.cat([offset, torch.eye(classes)[:, 1:]], 1)).Q[:, 1:]
