"""Gradients of each example's outputs by the controls of a delta, many examples in one pass.

With one copy of the controls for each example of a batch, a backward pass from the sum of an output
over the batch gives the gradient of every example, as no example meets the copy of another
(`deltacontrol.deltas.ensemble.stack`). Where copies cannot share a pass, examples pass alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltacontrol.deltas import DeltaModel, DeltaStack
from deltacontrol.deltas.ensemble.stack import tensors_of, unstackable
from deltacontrol.experiments.tasks.encoding import Batch, without_labels
from deltacontrol.theory.errors import InputError
from deltacontrol.theory.linear.step_graph import differentiable_attention

COPIES = 32  # of the controls in a pass
NUMBERS = 2**27  # of all copies


class ExampleGradients:
    """``J`` of the outputs ``f = C'z`` of examples, over all or some entries of the controls.

    Args:
        controlled: in evaluation mode. It may be used for nothing else until it is detached.
        contrasts: ``C``, (classes, outputs).
        columns: entries of a flat control that are wanted, by name; all of the others.

    Attributes:
        size: examples that share a pass.
    """

    def __init__(
        self, controlled: DeltaModel, contrasts: Tensor, columns: Mapping[str, Tensor]
    ) -> None:
        if controlled.training:
            raise InputError("the model is in training mode, where dropout acts; call eval() first")
        self.controlled, self.contrasts, self.columns = controlled, contrasts, columns
        numbers = sum(p.numel() for p in controlled.trainable().values())
        self.size = max(1, min(COPIES, NUMBERS // max(numbers, 1)))
        self._stack: DeltaStack | None = None
        if self.size > 1 and not unstackable(controlled.host):
            state = {n: v.detach().clone() for n, v in tensors_of(controlled).items()}
            seeds = [controlled.host.seed] * self.size
            self._stack = DeltaStack(controlled, seeds, [state] * self.size)

    def of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs (b, k) and their gradients (b, k, entries), for at most `size` examples."""
        if self._stack is not None:
            try:
                return self._together(self._stack, batch)
            except InputError:  # a law that copies cannot share, as the pass alone shows
                self._stack = None
        return self._alone(batch)

    def _together(self, stack: DeltaStack, batch: Batch) -> tuple[Tensor, Tensor]:
        count = len(batch["labels"])
        values = {n: p[:count].detach().requires_grad_() for n, p in stack.trainable().items()}
        with torch.enable_grad(), differentiable_attention():
            logits = stack.run(values, 0, count, without_labels(batch)).logits
            outputs = logits @ self.contrasts.to(logits)
        return outputs.detach(), self._pulled(outputs, values, stacked=True)

    def _alone(self, batch: Batch) -> tuple[Tensor, Tensor]:
        outputs, rows = [], []
        for number, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            one = {n: v[number : number + 1, :length] for n, v in without_labels(batch).items()}
            with torch.enable_grad(), differentiable_attention():
                logits = self.controlled(**one).logits
                found = logits @ self.contrasts.to(logits)
            outputs.append(found.detach())
            rows.append(self._pulled(found, self.controlled.trainable(), stacked=False))
        return torch.cat(outputs), torch.cat(rows)

    def _pulled(self, outputs: Tensor, values: Mapping[str, Tensor], *, stacked: bool) -> Tensor:
        """One backward pass an output; (b, k, entries)."""
        rows = []
        for a in range(outputs.shape[1]):
            found = torch.autograd.grad(
                outputs[:, a].sum(),
                list(values.values()),
                retain_graph=a + 1 < outputs.shape[1],
                allow_unused=True,
                materialize_grads=True,
            )
            parts = []
            for name, gradient in zip(values, found, strict=True):
                flat = gradient.reshape(len(outputs) if stacked else 1, -1)
                parts.append(flat[:, self.columns[name]] if name in self.columns else flat)
            rows.append(torch.cat(parts, 1))
        return torch.stack(rows, 1)
